"""What stands out in the statistics of an adapter, in two sentences of plain words."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

from moa_peft.inspection.results import GroupStatistics, RouterStatistics
from moa_peft.training.router_health import DEAD, expert_name, is_dead

ALWAYS = 0.95
"""A mean gate of at least this is that of an expert which is always on."""
STILL = 0.02
"""Gates with a standard deviation below this hardly depend on the token."""
ALIKE = 0.9
"""Experts with a CKA above this do nearly the same."""


def sentences(routers: Sequence[RouterStatistics], groups: Sequence[GroupStatistics]) -> tuple[str, ...]:
    """Say what stands out of one adapter: a sentence on how its experts are used, and one on how different they are.

    Each says the gravest that holds: experts never used, always on, gates that hardly depend on the token; thresholds
    that did not move, experts that do the same.
    """
    return _use(routers), _difference(routers, groups)


def _use(routers: Sequence[RouterStatistics]) -> str:
    if not routers:
        return "This mixture has no router: every expert is always fully on."
    thing = "prompts" if routers[0].granularity == "instance" else "tokens"
    dead = _places(routers, is_dead)
    if dead:
        return f"Never used: {_listed(dead)} (mean gate below {DEAD})."
    always = _places(routers, lambda mean, _: mean >= ALWAYS)
    if always:
        return f"Always on, whatever the {thing[:-1]}: {_listed(always)} (mean gate at least {ALWAYS})."
    if all(one.tokens < 2 for one in routers):
        return f"One {thing[:-1]} does not say how gates vary: give more prompts."
    named = [
        (mean, deviation, f"{expert_name(one.router, name)} in layer {one.layer}")
        for one in routers
        for name, mean, deviation in zip(one.names, one.mean_gate, one.deviation, strict=True)
        if mean is not None and deviation is not None
    ]
    least, most = min(named), max(named)
    liveliest = max(named, key=lambda one: one[1])
    varies = (
        f"the gate of {liveliest[2]} varies most, by {liveliest[1]:.2f} (standard deviation over the {thing})"
    )
    still = sum(one[1] < STILL for one in named)
    if 2 * still > len(named):
        return f"The routers hardly tell {thing} apart: {still} of {len(named)} gates vary by less than {STILL}; {varies}."
    return (
        f"Every expert is used: the mean gates lie between {least[0]:.2f} ({least[2]}) and {most[0]:.2f} ({most[2]}); "
        f"{varies}."
    )


def _difference(routers: Sequence[RouterStatistics], groups: Sequence[GroupStatistics]) -> str:
    thresholds = [one.threshold for one in routers if one.threshold is not None]
    fixed = [one for one in thresholds if one.trained is False]
    if fixed:
        return (
            f"The thresholds did not move in training in {len(fixed)} of {len(thresholds)} routers: their bias is "
            "exactly 0, as at the start."
        )
    if thresholds and all(rate == 1 for one in routers for rate in one.active_rate):
        return "The threshold switches no expert off, for any token."
    pairs = list(_compared(routers, groups))
    if not pairs:
        return "There are no two experts to compare, or they add nothing yet."
    cka, layer, one, other = max(pairs)
    alike = [pair for pair in pairs if pair[0] > ALIKE]
    if alike:
        rest = len(alike) - 1
        more = f" and {rest} more pair{'s' if rest > 1 else ''}" if rest else ""
        return f"Nearly the same is done by {one} and {other} in layer {layer} (CKA {cka:.2f}){more}."
    mean = sum(pair[0] for pair in pairs) / len(pairs)
    return (
        f"No two experts do the same: the mean CKA of a pair is {mean:.2f}, the most alike are {one} and {other} in "
        f"layer {layer} ({cka:.2f})."
    )


def _compared(
    routers: Sequence[RouterStatistics], groups: Sequence[GroupStatistics]
) -> Iterator[tuple[float, int, str, str]]:
    """CKA, layer and names of every two experts that a router chooses between; of all where nothing is routed."""
    routed = {(one.layer, one.router) for one in routers}
    for group in groups:
        if routed and (group.layer, group.router) not in routed:
            continue
        names = [expert_name(group.router, one) for one in group.changes.names]
        for a, b in combinations(range(len(names)), 2):
            if (cka := group.changes.cka[a][b]) is not None:
                yield cka, group.layer, names[a], names[b]


def _places(routers: Sequence[RouterStatistics], holds: Callable[[float, int], bool]) -> dict[str, list[int]]:
    """Experts for whose mean gate, among so many of its router, something holds, with the layers where it does."""
    found: dict[str, list[int]] = {}
    for one in routers:
        for name, mean in zip(one.names, one.mean_gate, strict=True):
            if mean is not None and holds(mean, len(one.names)):
                found.setdefault(expert_name(one.router, name), []).append(one.layer)
    return found


def _listed(layers: Mapping[str, Sequence[int]], most: int = 3) -> str:
    """Name experts with the layers in which something holds, those with the most layers first."""
    ranked = sorted(layers.items(), key=lambda one: -len(one[1]))
    words = [
        f"{name} in {'layer' if len(found) == 1 else f'{len(found)} layers:'} {ranges(found)}"
        for name, found in ranked[:most]
    ]
    rest = len(ranked) - most
    return ", ".join(words) + (f" and {rest} more expert{'s' if rest > 1 else ''}" if rest > 0 else "")


def ranges(numbers: Sequence[int]) -> str:
    """Write whole numbers, as of layers, with runs joined: 0-3, 7."""
    parts: list[list[int]] = []
    for one in sorted(numbers):
        if parts and one == parts[-1][-1] + 1:
            parts[-1].append(one)
        else:
            parts.append([one])
    return ", ".join(str(one[0]) if len(one) == 1 else f"{one[0]}-{one[-1]}" for one in parts)
