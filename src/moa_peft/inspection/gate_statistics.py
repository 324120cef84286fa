"""Statistics of gates: pure functions of sums over tokens.

Sizes: T tokens, E experts (or kinds, or copies: whatever one router weights), P ranges of positions, S classes of tokens.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

CLASSES = ("number", "word", "punctuation", "template", "special")
"""Every token is one of these; see `token_class`."""


def token_class(piece: str, *, special: bool, template: bool) -> int:
    """Classify a token.

    Args:
        piece: The token's text.
        special: Whether the tokenizer holds it for a special token.
        template: Whether it belongs to the words around a question that every question has.

    Returns:
        A place in `CLASSES`. The first that holds: special; template; a number if it has a digit; a word if it has a
        letter; else punctuation, which is also white space.
    """
    if special:
        return CLASSES.index("special")
    if template:
        return CLASSES.index("template")
    if any(one.isdigit() for one in piece):
        return CLASSES.index("number")
    return CLASSES.index("word" if any(one.isalpha() for one in piece) else "punctuation")


POSITIONS = 16
"""Ranges of positions: 0, 1, 2-3, 4-7, 8-15 and so on; the last holds all from 2**14."""
BINS = 200
"""Bins of thresholds over [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class GateSums:
    """Sums over tokens of what one router said, in float64. The sums of two batches are added field by field."""

    tokens: Tensor
    """[]: T."""
    gate: Tensor
    """[E]: sum of g_te over the tokens t."""
    square: Tensor
    """[E]: sum of the squares."""
    active: Tensor
    """[E]: tokens with a gate above 0."""
    above_half: Tensor
    """[E]: tokens with a gate above 0.5."""
    entropy: Tensor
    """[2]: the sum of `token_entropy`, and of the tokens that have one."""
    num_active: Tensor
    """[E + 1]: tokens by how many of their gates are above 0."""
    position: Tensor
    """[P, E]: sum of the gates of the tokens in each range of positions."""
    position_tokens: Tensor
    """[P]: their number."""
    token_class: Tensor
    """[S, E]: sum of the gates of the tokens of each class."""
    token_class_tokens: Tensor
    """[S]: their number."""
    threshold: Tensor
    """[3]: tokens with a threshold, the sum of their thresholds and of the squares."""
    threshold_bins: Tensor
    """[BINS]: tokens by threshold."""

    def __add__(self, other: "GateSums") -> "GateSums":
        return GateSums(
            **{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)}
        )


def gate_sums(
    gates: Tensor,
    *,
    threshold: Tensor | None = None,
    positions: Tensor | None = None,
    classes: Tensor | None = None,
) -> GateSums:
    """Sum up a batch.

    Args:
        gates: Float, [T, E], those of real tokens; one row an instance where a whole instance has the same.
        threshold: Float, [T]; None where the gate has none.
        positions: Int64, [T], each token's place in its text from 0; None for gates of a whole instance.
        classes: Int64, [T], places in `CLASSES`; None where the tokens are not classified.

    Returns:
        The sums.
    """
    g = gates.to(torch.float64)
    number, experts = g.shape
    on = g > 0
    entropy = token_entropy(g)
    known = ~entropy.isnan()
    ranges = None if positions is None else position_range(positions)
    by_position, position_tokens = _sums_by(g, ranges, POSITIONS)
    by_class, class_tokens = _sums_by(g, classes, len(CLASSES))
    limits = g.new_zeros(0) if threshold is None else threshold.to(torch.float64)
    bins = (limits * BINS).long().clamp(0, BINS - 1)
    return GateSums(
        tokens=g.new_tensor(float(number)),
        gate=g.sum(0),
        square=g.square().sum(0),
        active=on.sum(0).double(),
        above_half=(g > 0.5).sum(0).double(),
        entropy=torch.stack([entropy[known].sum(), known.sum().double()]),
        num_active=torch.bincount(on.sum(1), minlength=experts + 1).double(),
        position=by_position,
        position_tokens=position_tokens,
        token_class=by_class,
        token_class_tokens=class_tokens,
        threshold=torch.stack([g.new_tensor(float(len(limits))), limits.sum(), limits.square().sum()]),
        threshold_bins=torch.bincount(bins, minlength=BINS).double(),
    )


def token_entropy(gates: Tensor) -> Tensor:
    """The normalised entropy of each token's gates: ``-sum_e p_te log p_te / log E`` with ``p_te = g_te / sum_e g_te``.

    Args:
        gates: Float64, [T, E], at least 0.

    Returns:
        Float64, [T], in [0, 1]: 1 where all gates are equal, 0 where one has everything; NaN where all are 0, or E is 1.
    """
    experts = gates.shape[-1]
    if experts == 1:
        return torch.full_like(gates[..., 0], torch.nan)
    share = gates / gates.sum(-1, keepdim=True)
    return -torch.xlogy(share, share).sum(-1) / torch.log(gates.new_tensor(float(experts)))


def position_range(positions: Tensor) -> Tensor:
    """Number the ranges of positions: 0 for 0, else ``1 + floor(log2 position)``, at most `POSITIONS` - 1."""
    return (
        (1 + positions.clamp(min=1).double().log2().floor().long())
        .where(positions > 0, 0)
        .clamp(max=POSITIONS - 1)
    )


def gate_deviation(sums: GateSums) -> Tensor:
    """How much each gate differs from token to token: its standard deviation over the tokens, the population's; float64, [E]."""
    mean = sums.gate / sums.tokens
    return (sums.square / sums.tokens - mean.square()).clamp(min=0).sqrt()


def load_share(gate: Tensor) -> Tensor:
    """Share out the routing: ``l_e = sum_t g_te / sum_te g_te``.

    Args:
        gate: Float64, [E], the sums over tokens.

    Returns:
        Float64, [E], summing to 1; NaN where every gate is 0.

    Source: the importance of an expert in Shazeer et al., arXiv 1701.06538, equation 6, divided by the whole.
    """
    return gate / gate.sum()


def load_variation(gate: Tensor) -> float | None:
    """How unevenly the experts are used: the coefficient of variation ``std_e(l_e) / mean_e(l_e)`` of their load.

    Args:
        gate: Float64, [E], the sums over tokens.

    Returns:
        In [0, sqrt(E - 1)]: 0 where all have the same load, sqrt(E - 1) where one has everything. The deviation is the
        population's (divided by E). None where there is one expert, or every gate is 0.

    Source: Shazeer et al., arXiv 1701.06538, equation 7, whose loss has its square; no departure.
    """
    share = load_share(gate)
    if len(share) < 2 or bool(share.isnan().any()):
        return None
    return float(share.std(correction=0) / share.mean())


def _sums_by(gates: Tensor, groups: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
    """Sum gates [T, E] by the group of each token: [number, E], and the tokens of each."""
    sums, tokens = gates.new_zeros((number, gates.shape[1])), gates.new_zeros(number)
    if groups is None:
        return sums, tokens
    return sums.index_add(0, groups, gates), tokens.index_add(0, groups, gates.new_ones(len(groups)))
