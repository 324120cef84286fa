"""What an inspection found, as plain numbers: the fields are those of its JSON file.

Sizes: E experts (or kinds, or copies), P ranges of positions, S classes of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moa_peft.inspection.change_sums import ChangeStatistics
from moa_peft.inspection.gate_statistics import GateSums, load_share, load_variation

Numbers = tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ThresholdStatistics:
    """The thresholds of one router over the tokens."""

    mean: float
    """Over the tokens."""
    deviation: float
    """Standard deviation over the tokens."""
    bins: tuple[float, ...]
    """Share of the tokens by threshold, in bins of equal width over [0, 1]."""
    trained: bool | None
    """False where the threshold's bias is exactly 0 as at its start, so that no step has moved it; None if constant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterStatistics:
    """What one router did. A gate of a whole instance counts once a prompt, any other once a token."""

    layer: int
    """The block, from 0."""
    router: str
    """"" for the block's; an expert's name for that of its copies."""
    names: tuple[str, ...]
    """What it weighs: experts, kinds of experts, or copies."""
    granularity: str
    """token or instance."""
    tokens: int
    """Tokens, or prompts, counted."""
    mean_gate: Numbers
    """By expert."""
    deviation: Numbers
    """Standard deviation of each gate over the tokens."""
    active_rate: Numbers
    """Share of the tokens with a gate above 0."""
    above_half_rate: Numbers
    """Share of the tokens with a gate above 0.5."""
    load: Numbers
    """Each expert's part of the sum of all gates; None where all are 0."""
    load_variation: float | None
    """Coefficient of variation of the load; None with one expert."""
    entropy: float | None
    """Mean over the tokens of the entropy of a token's gates, divided by its maximum; None with one expert."""
    active_experts: float
    """Mean number of gates above 0."""
    active_counts: tuple[float, ...]
    """Share of the tokens with 0, 1, ... E gates above 0."""
    threshold: ThresholdStatistics | None
    """None where the gate has none."""
    by_position: tuple[Numbers, ...]
    """Mean gates by range of positions: 0, 1, 2-3, 4-7 and so on; None where no token stands there."""
    by_class: tuple[Numbers, ...]
    """Mean gates by class of token, in the order of `CLASSES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupStatistics:
    """What the experts of one block, or the copies of one expert, add."""

    layer: int
    """The block, from 0."""
    router: str
    """"" for the experts of the block; an expert's name for its copies."""
    changes: ChangeStatistics
    """What the changes are like."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What was found about one adapter."""

    routers: tuple[RouterStatistics, ...]
    """By layer, the block's router before those of copies; empty where nothing is routed."""
    groups: tuple[GroupStatistics, ...]
    """By layer, likewise."""
    about: dict[str, Any]
    """The adapter: its name, method, base model, config and parameters."""
    sentences: tuple[str, ...]
    """What stands out, in words."""


def router_statistics(
    layer: int, router: str, names: Sequence[str], sums: GateSums, *, granularity: str, trained: bool | None
) -> RouterStatistics:
    """Turn sums into means.

    Args:
        layer: The block.
        router: The router's name.
        names: What it weighs.
        sums: Over at least one token.
        granularity: token or instance.
        trained: Whether a learned threshold has moved.

    Returns:
        The statistics.
    """
    tokens = sums.tokens
    mean = sums.gate / tokens
    spread = (sums.square / tokens - mean.square()).clamp(min=0).sqrt()
    return RouterStatistics(
        layer=layer,
        router=router,
        names=tuple(names),
        granularity=granularity,
        tokens=int(tokens),
        mean_gate=_numbers(mean),
        deviation=_numbers(spread),
        active_rate=_numbers(sums.active / tokens),
        above_half_rate=_numbers(sums.above_half / tokens),
        load=_numbers(load_share(sums.gate)),
        load_variation=load_variation(sums.gate),
        entropy=_numbers(sums.entropy[:1] / sums.entropy[1])[0],
        active_experts=float(sums.active.sum() / tokens),
        active_counts=tuple((sums.num_active / tokens).tolist()),
        threshold=_threshold(sums, trained),
        by_position=_rows(sums.position, sums.position_tokens),
        by_class=_rows(sums.token_class, sums.token_class_tokens),
    )


def _threshold(sums: GateSums, trained: bool | None) -> ThresholdStatistics | None:
    tokens, total, square = sums.threshold.tolist()
    if tokens == 0:
        return None
    mean = total / tokens
    return ThresholdStatistics(
        mean=mean,
        deviation=max(square / tokens - mean**2, 0) ** 0.5,
        bins=tuple((sums.threshold_bins / tokens).tolist()),
        trained=trained,
    )


def _rows(sums: Tensor, tokens: Tensor) -> tuple[Numbers, ...]:
    return tuple(_numbers(row) for row in sums / tokens.unsqueeze(-1))


def _numbers(values: Tensor) -> Numbers:
    """Plain numbers; None where there is none."""
    return tuple(
        one if known else None
        for one, known in zip(values.tolist(), torch.isfinite(values).tolist(), strict=True)
    )
