"""When a router goes wrong in training: experts that are never used, gates that are stuck.

Sizes: B rows, T tokens of a row, E experts.
"""

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

DEAD = 0.01
"""A mean gate below this is that of a dead expert."""
STUCK = 0.99
"""A gate above this hardly moves any more; a gate is saturated where most tokens have it there."""
FEWEST = 32
"""Tokens, or instances, that must have been counted before anything is said."""

ADVICE = {
    "dead": "try a lower learning_rate, fewer experts, or, where gates choose, a balance loss "
    "(--mixture.router.balance 0.01)",
    "saturated": "try a lower learning_rate, a longer warm-up, or --mixture.router.router_input projection, whose norm keeps "
    "the router's input small",
}
"""What to try, by what is wrong."""

Where = tuple[int, str]
"""A layer and the name of its router."""


def trouble_sums(gates: Tensor, real: Tensor) -> Tensor:
    """Sum up what trouble is seen by.

    Args:
        gates: Float32, [B, T, E].
        real: Float, broadcastable to [B, T], 1 for tokens that count.

    Returns:
        Float, [2 E + 1]: each gate's sum, the tokens that it is stuck for, and the number of tokens.
    """
    weight = real.unsqueeze(-1)
    stuck = (gates > STUCK).to(gates) * weight
    return torch.cat([(gates * weight).sum((0, 1)), stuck.sum((0, 1)), real.sum().reshape(1)])


def find_trouble(
    sums: Mapping[Where, Sequence[float]], names: Mapping[Where, Sequence[str]]
) -> dict[str, list[str]]:
    """Find dead experts and saturated gates.

    Args:
        sums: From `trouble_sums`, by router.
        names: What each router weighs.

    Returns:
        Experts in words, under "dead" and "saturated"; routers of one expert and those seen too little are left out.
    """
    found: dict[str, list[str]] = {"dead": [], "saturated": []}
    for (layer, router), values in sums.items():
        experts, tokens = names[layer, router], values[-1]
        if tokens < FEWEST or len(experts) < 2:
            continue
        for place, name in enumerate(experts):
            said = f"copy {name} of {router}" if router else name
            if values[place] / tokens < DEAD:
                found["dead"].append(f"{said} in layer {layer}")
            if values[len(experts) + place] / tokens > 0.5:
                found["saturated"].append(f"{said} in layer {layer}")
    return found


class TroubleWatch:
    """Warns of each kind of trouble once, on standard error."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def look(
        self, sums: Mapping[Where, Sequence[float]], names: Mapping[Where, Sequence[str]], step: int
    ) -> None:
        """Look at what was summed up until a step, and warn of what is new."""
        for kind, places in find_trouble(sums, names).items():
            if places and kind not in self._said:
                self._said.add(kind)
                tqdm.write(warning(kind, places, step), file=sys.stderr)


def warning(kind: str, places: Sequence[str], step: int) -> str:
    """Write a warning in a line."""
    what = {
        "dead": f"never used: {_listed(places)} (mean gate below {DEAD})",
        "saturated": f"saturated: the gate of {_listed(places)} is above {STUCK} for most tokens, so it hardly learns",
    }
    return f"moa: warning: step {step}: {what[kind]}; {ADVICE[kind]}; `moa inspect` shows more"


def _listed(places: Sequence[str], most: int = 3) -> str:
    rest = len(places) - most
    return ", ".join(places[:most]) + (f" and {rest} more" if rest > 0 else "")
