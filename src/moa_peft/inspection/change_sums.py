"""Sums over the changes of a group of experts: those of a block, or the copies of one expert at its site.

Sizes: T tokens of a batch, D outputs of a site, K directions of a change.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from moa_peft.inspection.similarity import cosines, effective_rank, is_flat, linear_cka
from moa_peft.inspection.streaming_moments import JointMoments
from moa_peft.inspection.subspace import GrowingBasis

DIRECTIONS = 1536
"""Directions kept of all changes of a group together; LoRA, adapters and prompts of usual sizes need far fewer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangeStatistics:
    """What the changes of a group of experts are like. A change is what was added: the gated one, at real tokens."""

    names: tuple[str, ...]
    """The experts of the block, or the numbers of the copies."""
    cka: tuple[tuple[float | None, ...], ...]
    """Linear CKA of each pair; None where one does not vary."""
    cosine: tuple[tuple[float | None, ...], ...]
    """Mean cosine of each pair over the tokens that both change; None for changes of different outputs."""
    effective_rank: tuple[float | None, ...]
    """Of each change; None where there is none."""
    norm: tuple[float, ...]
    """Mean length of each change over the tokens."""
    norm_share: tuple[float | None, ...]
    """Its part of the sum of the group's; None where nothing changes."""
    captured: tuple[float, ...]
    """The part of each change's energy that the similarities and ranks are taken of, in [0, 1]."""

    @property
    def mean_cka(self) -> float | None:
        """Mean over the pairs that have one; None where none has."""
        found = [self.cka[a][b] for a, b in combinations(range(len(self.names)), 2)]
        known = [one for one in found if one is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One expert's change in one batch, in few numbers."""

    coordinates: Tensor
    """Float64, [T, K], in the expert's basis."""
    length: Tensor
    """Float64, [T]."""


class ChangeSums:
    """Streaming sums over a group's changes.

    Args:
        outputs: What each expert adds to, by its name; experts with the same are compared by cosine as well.
        directions: Directions kept of the group's changes together.
    """

    def __init__(self, outputs: Mapping[str, Hashable], directions: int = DIRECTIONS) -> None:
        self.outputs = dict(outputs)
        self._most = max(directions // len(self.outputs), 1)
        self._bases: dict[str, GrowingBasis] = {}
        self._moments = JointMoments()
        self._lengths = dict.fromkeys(self.outputs, 0.0)
        self._cosines: dict[tuple[str, str], tuple[float, int]] = {
            pair: (0.0, 0)
            for pair in combinations(self.outputs, 2)
            if self.outputs[pair[0]] == self.outputs[pair[1]]
        }

    def reduce(self, name: str, change: Tensor) -> Change:
        """Express a batch of one expert's changes [T, D] in few numbers. Nothing is summed up yet."""
        if name not in self._bases:
            self._bases[name] = GrowingBasis(change.shape[1], self._most, change.device)
        return Change(
            coordinates=self._bases[name].coordinates(change),
            length=change.to(torch.float64).square().sum(-1).sqrt(),
        )

    def add(self, changes: Mapping[str, Change]) -> None:
        """Sum up a batch: the change of every expert of the group, at the same tokens."""
        self._moments.add({name: changes[name].coordinates for name in self.outputs})
        for name in self.outputs:
            self._lengths[name] += float(changes[name].length.sum())
        for (a, b), (total, number) in self._cosines.items():
            between = self._bases[a].vectors.T @ self._bases[b].vectors
            one, other = changes[a], changes[b]
            found = cosines(one.coordinates, other.coordinates, between, one.length, other.length)
            self._cosines[a, b] = (total + float(found.sum()), number + len(found))

    def statistics(self) -> ChangeStatistics:
        """What the changes are like so far."""
        names = tuple(self.outputs)
        tokens = max(self._moments.count, 1)
        whole = sum(self._lengths.values())
        return ChangeStatistics(
            names=names,
            cka=tuple(tuple(self._cka(a, b) for b in names) for a in names),
            cosine=tuple(tuple(self._cosine(a, b) for b in names) for a in names),
            effective_rank=tuple(effective_rank(self._moments.second(one, one)) for one in names),
            norm=tuple(self._lengths[one] / tokens for one in names),
            norm_share=tuple(self._lengths[one] / whole if whole > 0 else None for one in names),
            captured=tuple(self._bases[one].captured for one in names),
        )

    def _cka(self, a: str, b: str) -> float | None:
        own = [self._moments.products(one, one) for one in (a, b)]
        if any(is_flat(one, self._moments.second(name, name)) for one, name in zip(own, (a, b), strict=True)):
            return None
        return linear_cka(self._moments.products(a, b), *own)

    def _cosine(self, a: str, b: str) -> float | None:
        if a == b:
            return 1.0 if self._lengths[a] > 0 else None
        total, number = self._cosines.get((a, b)) or self._cosines.get((b, a)) or (0.0, 0)
        return total / number if number else None
