"""Timing in turn, so that a machine whose speed drifts is as slow for each: A B C, B A C, ...

The order changes from round to round: whoever always ran after the same other would always find the memory that it leaves,
and pay for what is missing.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Quartiles = tuple[float, float, float]
"""First quartile, median, third quartile."""


def take_turns(
    work: Mapping[str, Callable[[], None]],
    pairs: int,
    *,
    warm_up: int = 1,
    on_turn: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time several pieces of work in turn, each round in an order of its own, which is the same in every run.

    Args:
        work: By name; each waits for its device before it returns.
        pairs: How often each is timed.
        warm_up: How often each runs untimed first.
        on_turn: Called after each round, the warm-up's too.

    Returns:
        Seconds, by name, in the order they were taken.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    orders = random.Random(0)
    for turn in range(warm_up + pairs):
        for name in orders.sample(list(work), len(work)):
            start = time.perf_counter()
            work[name]()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
        on_turn()
    return times


def quartiles(values: Sequence[float]) -> Quartiles:
    """First quartile, median and third quartile; of one value, the value three times."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def ratios(times: Sequence[float], others: Sequence[float]) -> Quartiles:
    """Quartiles of the ratio of two timings, pair by pair."""
    return quartiles([one / other for one, other in zip(times, others, strict=True)])
