"""Mean gates of a mixture's experts over the real tokens of prompts with their answers.

Sizes: B rows, T tokens of a row, N copies of an expert.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moa_peft.evaluation.batching import padded_call, plan_batches, rows_at_once
from moa_peft.evaluation.scoring import TOKEN_BUDGET, TokenQuestion
from moa_peft.mixture.block_hooks import GateRecord, MoALayer, mixture_layers
from moa_peft.mixture.experts.lora import LowRankChange
from moa_peft.mixture.mixture import Mixture, Place


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertFigures:
    """One expert of the mixture, over all of its blocks."""

    name: str
    """The expert's name, as in "lora_q_proj"."""
    mean_gate: float
    """Its mean gate over tokens and blocks; that of all its copies together."""
    gate_deviation: float
    """Standard deviation of that gate over tokens, the mean over blocks: what freezing it loses."""
    blocks: int
    """Blocks that carry it."""
    kept: bool
    """Whether it is in the export."""


@dataclass(kw_only=True, slots=True)
class GateMeans:
    """Sums of one expert's gates over tokens, in one block."""

    total: Tensor
    """Float64, [N]: of each copy's gate, the block's gate included."""
    of_all: float = 0.0
    """Of the gates of all copies together."""
    of_squares: float = 0.0
    """Of the squares of that."""
    tokens: float = 0.0

    def mean(self) -> Tensor:
        """The mean gate of each copy, float64, [N]."""
        return self.total / self.tokens

    def deviation(self) -> float:
        """Standard deviation over tokens of the gate of all copies together."""
        mean = self.of_all / self.tokens
        return math.sqrt(max(0.0, self.of_squares / self.tokens - mean * mean))


Means = dict[tuple[str, str], GateMeans]
"""By the name of the tuner layer and of the expert."""


def places_of(model: Any) -> Iterator[tuple[str, Mixture, Place]]:
    """Every expert's place in every mixture, with the name of the tuner layer."""
    for name, layer in mixture_layers(model):
        for mixture in layer.mixtures().values():
            for place in mixture.places:
                yield name, mixture, place


@torch.inference_mode()
def gate_means(model: Any, questions: Sequence[TokenQuestion], batch_size: int) -> Means:
    """Take the mean gates of every expert over the real tokens of prompts and their answers.

    Args:
        model: A mixture in PEFT's wrapper, in evaluation mode.
        questions: Prompts with one completion each.
        batch_size: Most rows in a forward pass; one where official instance gates count padding in.

    Returns:
        Sums, by tuner layer and expert. Where an expert has copies, their gates are multiplied by the block's token by
        token, as the mixture does.
    """
    layers = mixture_layers(model)
    means: Means = {}
    mask: list[Tensor] = []  # of the batch that is running
    for name, layer in layers:
        layer.observer = _observer(name, layer, means, mask)
    batches = plan_batches(
        [one.num_tokens for one in questions],
        batch_size=rows_at_once(model, batch_size),
        token_budget=TOKEN_BUDGET,
    )
    try:
        for batch in with_bar(batches, "gates"):
            chosen = [questions[place] for place in batch]
            whole = [[*one.prompt, *one.completions[0]] for one in chosen]
            call = padded_call(model, whole, prompts=[len(one.prompt) for one in chosen])
            mask[:] = [call["attention_mask"].double()]
            model(**call, use_cache=False)
    finally:
        for _, layer in layers:
            layer.observer = None
    for name, _, place in places_of(model):
        if (name, place.name) not in means:  # no router: the gate is 1
            one = torch.ones(1, dtype=torch.float64)
            means[name, place.name] = GateMeans(total=one, of_all=1.0, of_squares=1.0, tokens=1.0)
    return means


def _observer(name: str, layer: MoALayer, means: Means, mask: list[Tensor]) -> Callable[[GateRecord], None]:
    """Add up the gates of one block. In each pass the block's router comes before those of copies."""
    latest: dict[str, Tensor] = {}

    def add(record: GateRecord) -> None:
        mixture = layer.mixtures()[record.adapter]
        if not record.router:
            latest[""] = record.gates
            for place in mixture.places:
                if place.name not in mixture.copy_routers:
                    column = record.gates[..., place.column : place.column + 1]
                    _add_up(means, (name, place.name), column, mask[0])
            return
        place = next(one for one in mixture.places if one.name == record.router)
        gates = record.gates
        if mixture.router is not None:
            gates = latest[""][..., place.column : place.column + 1] * gates
        _add_up(means, (name, place.name), gates, mask[0])

    return add


def _add_up(means: Means, key: tuple[str, str], gates: Tensor, mask: Tensor) -> None:
    """Add gates [B, T or 1, N] of the tokens that count in the mask [B, T]."""
    mask = mask.to(gates.device)  # of the block, where a device_map may have put it
    gates = gates.double().expand(-1, mask.shape[1], -1)
    sums = means.setdefault(key, GateMeans(total=torch.zeros(gates.shape[-1], dtype=torch.float64)))
    together = gates.sum(dim=-1)
    sums.total += (gates * mask.unsqueeze(-1)).sum(dim=(0, 1)).cpu()
    sums.of_all += float((together * mask).sum())
    sums.of_squares += float((together.square() * mask).sum())
    sums.tokens += float(mask.sum())


def expert_figures(model: Any, means: Mapping[tuple[str, str], GateMeans]) -> list[ExpertFigures]:
    """Sum up the gates of each expert over the blocks; one entry for each expert, in the order of the mixtures."""
    found: dict[str, list[GateMeans]] = {}
    kept: dict[str, bool] = {}
    for name, mixture, place in places_of(model):
        found.setdefault(place.name, []).append(means[name, place.name])
        kept[place.name] = type(mixture.experts[place.name]) is LowRankChange
    return [
        ExpertFigures(
            name=name,
            mean_gate=sum(one.of_all / one.tokens for one in sums) / len(sums),
            gate_deviation=sum(one.deviation() for one in sums) / len(sums),
            blocks=len(sums),
            kept=kept[name],
        )
        for name, sums in found.items()
    ]


def with_bar(batches: Sequence[list[int]], what: str) -> Iterator[list[int]]:
    """Go through batches of rows with a bar on standard error, where that takes over two seconds."""
    with tqdm(total=sum(map(len, batches)), desc=what, unit="row", delay=2, file=sys.stderr) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
