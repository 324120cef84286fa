"""How alike the changes of experts are, how many directions they take, and how large they are.

Sizes: T tokens, K_a and K_b numbers of the changes of two experts a and b.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from moa_peft.inspection.streaming_moments import GrowingBasis, JointMoments

FLAT = 1e-10
"""A change whose spread is below this part of its energy is the same for every token, up to rounding."""


DIRECTIONS = 1536
"""Directions kept of all changes of a group together; LoRA, adapters and prompts of usual sizes need far fewer."""


def linear_cka(cross: Tensor, own_a: Tensor, own_b: Tensor) -> float | None:
    """Compare two experts' changes: ``|C_ab|^2 / (|C_aa| |C_bb|)``, with ``C_ab = sum_t (a_t - m_a)(b_t - m_b)^T``.

    The sites may have different sizes. Turning a change, or making all of it larger, alters nothing.

    Args:
        cross: Float64, [K_a, K_b], C_ab; the norms are Frobenius'.
        own_a: Float64, [K_a, K_a], C_aa.
        own_b: Float64, [K_b, K_b], C_bb.

    Returns:
        In [0, 1]: 1 where b is a turned and scaled, 0 where no part of one goes with a part of the other. None where one
        of them does not change.

    Source: Kornblith et al., arXiv 1905.00414, equation 5; no departure.
    """
    scale = float(own_a.norm() * own_b.norm())
    return min(float(cross.square().sum()) / scale, 1.0) if scale > 0 else None


def joint_cka(moments: JointMoments, a: str, b: str) -> float | None:
    """Compare two labels' vectors by `linear_cka`; None where one is the same for every token: it goes with nothing."""
    own = [moments.products(one, one) for one in (a, b)]
    whole = [moments.second(one, one) for one in (a, b)]
    if any(
        float(one.trace()) <= FLAT * float(second.trace()) for one, second in zip(own, whole, strict=True)
    ):
        return None
    return linear_cka(moments.products(a, b), *own)


def effective_rank(second: Tensor) -> float | None:
    """Count the directions that a change really uses: ``exp(-sum_i p_i log p_i)`` with ``p_i = s_i / sum_j s_j``.

    Args:
        second: Float64, [K, K], ``sum_t x_t x_t^T`` of the changes x_t; the s_i are the roots of its eigenvalues, the
            singular values of the changes stacked as rows.

    Returns:
        In [1, K]: 1 where all changes lie on one line, K where all directions are used alike. None where there is no
        change.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, definition 1; no departure.
    """
    if second.numel() == 0:
        return None
    sizes = torch.linalg.eigvalsh(second).clamp(min=0).sqrt()
    if not float(sizes.sum()) > 0:
        return None
    share = sizes / sizes.sum()
    return float((-torch.xlogy(share, share).sum()).exp())


def cosines(a: Tensor, b: Tensor, between: Tensor, length_a: Tensor, length_b: Tensor) -> Tensor:
    """Compare the directions of two changes of the same output: ``a_t . b_t / (|a_t| |b_t|)`` for each token.

    Args:
        a: Float64, [T, K_a], coordinates in a's basis.
        b: Float64, [T, K_b], likewise.
        between: Float64, [K_a, K_b], the products of the two bases' directions.
        length_a: Float64, [T], the lengths of a's changes.
        length_b: Float64, [T].

    Returns:
        Float64, one for each token at which neither is 0, in [-1, 1].
    """
    both = (length_a > 0) & (length_b > 0)
    return ((a @ between * b).sum(-1)[both] / (length_a[both] * length_b[both])).clamp(-1, 1)


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
        length = change.to(torch.float64).square().sum(-1).sqrt()
        return Change(coordinates=self._bases[name].coordinates(change), length=length)

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
            cka=tuple(tuple(joint_cka(self._moments, a, b) for b in names) for a in names),
            cosine=tuple(tuple(self._cosine(a, b) for b in names) for a in names),
            effective_rank=tuple(effective_rank(self._moments.second(one, one)) for one in names),
            norm=tuple(self._lengths[one] / tokens for one in names),
            norm_share=tuple(self._lengths[one] / whole if whole > 0 else None for one in names),
            captured=tuple(self._bases[one].captured for one in names),
        )

    def _cosine(self, a: str, b: str) -> float | None:
        if a == b:
            return 1.0 if self._lengths[a] > 0 else None
        total, number = self._cosines.get((a, b)) or self._cosines.get((b, a)) or (0.0, 0)
        return total / number if number else None
