"""What an inspection found, as plain numbers: the fields are those of its JSON file.

Sizes: E experts (or kinds, or copies), P ranges of positions, S classes of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moa_peft.inspection.forward_pass import TokenText, check_texts, read
from moa_peft.inspection.gate_statistics import GateSums, gate_deviation, load_share, load_variation
from moa_peft.inspection.observer import Observer
from moa_peft.inspection.prompts import Prompt, token_ids
from moa_peft.inspection.similarity import ChangeStatistics
from moa_peft.mixture.block_hooks import mixtures_of

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
    """What it weights: experts, kinds of experts, or copies."""
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
    """Turn sums over at least one token into means; ``trained`` says whether a learned threshold has moved."""
    tokens = sums.tokens
    return RouterStatistics(
        layer=layer,
        router=router,
        names=tuple(names),
        granularity=granularity,
        tokens=int(tokens),
        mean_gate=_numbers(sums.gate / tokens),
        deviation=_numbers(gate_deviation(sums)),
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


def routing_summary(
    model: Any, tokenizer: Any, texts: Sequence[str | Prompt], *, batch_size: int = 8
) -> dict[str, float | None]:
    """Measure how evenly and how differently a model's experts work, in one pass over texts.

    Each number is a mean over the routers of all blocks: those of the blocks, and those that weight the copies of an
    expert at its site. A change is the gated one, what is really added. Padding does not count.

    Args:
        model: A causal language model of transformers, bare or in PEFT's wrapper. It stays as it is.
        tokenizer: The base model's; it adds its special tokens, but to a prompt that holds them already.
        texts: At least one; a row as the model sees it comes from `as_prompt`.
        batch_size: Most texts in a forward pass; no number depends on it beyond rounding.

    Returns:
        ``load_variation``, the coefficient of variation of the experts' load (`load_variation`);
        ``mean_cka``, the mean linear CKA of the pairs of what a router weights (`linear_cka`);
        ``active_experts``, the mean number of gates above 0 of a token; ``gate_deviation``, the standard deviation of a
        gate over the tokens, mean over the experts: 0 where a router has learnt to tell no token from another. Each is
        None where no router has one: in a model without a mixture or a router, with one expert, where nothing is added.

    Raises:
        UsageError: If there is no text, or one has no tokens or more than the model reads.
    """
    if not any(one.routers() for one in mixtures_of(model)):
        return dict.fromkeys(("load_variation", "mean_cka", "active_experts", "gate_deviation"))
    prompts = [one if isinstance(one, Prompt) else Prompt(text=one, own=()) for one in texts]
    tokens = [TokenText(ids=token_ids(one, tokenizer)) for one in prompts]
    check_texts(model, tokens)
    observer = Observer(model)
    read(model, observer, tokens, batch_size=batch_size)
    groups = [observer.groups[one].statistics() for one in observer.gates if one in observer.groups]
    return {
        "load_variation": _mean([load_variation(sums.gate) for sums in observer.gates.values()]),
        "mean_cka": _mean([one.mean_cka for one in groups]),
        "active_experts": _mean([float(one.active.sum() / one.tokens) for one in observer.gates.values()]),
        "gate_deviation": _mean([float(gate_deviation(sums).mean()) for sums in observer.gates.values()]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [one for one in values if one is not None]
    return sum(known) / len(known) if known else None
