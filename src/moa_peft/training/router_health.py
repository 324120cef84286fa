# ruff: noqa: ARG002  # a callback of the trainer is given more than it needs
"""Router figures for the training log, and warnings of dead experts and saturated gates."""

import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from moa_peft.mixture.block_hooks import GateRecord, MoALayer

DEAD = 0.01
"""A mean gate below this is that of a dead expert; see `is_dead`."""


STUCK = 0.99
"""A gate above this hardly moves any more; a gate is saturated where most tokens have it there."""


FEWEST = 32
"""Tokens, or instances, that must have been counted before a warning."""


ADVICE = {
    "dead": "try a lower learning_rate, fewer experts, or, where gates choose, a balance loss "
    "(--mixture.router.balance 0.01)",
    "saturated": "try a lower learning_rate, a longer warm-up, or --mixture.router.router_input projection, whose norm keeps "
    "the router's input small",
}
"""What to try, by what is wrong."""


Where = tuple[int, str]
"""A layer and the name of its router."""


Sums = dict[tuple[int, str], list[float]]
"""Sums over tokens and passes by layer and by what they are of: an expert, or a router."""


class RouterFigures(TrainerCallback):
    """Observes the routers in the forward passes of logging steps and averages over tokens and blocks.

    Of the blocks' routers, for each expert ``router/gate_mean/NAME``. With a threshold ``router/active_rate/NAME``, the
    share of tokens with a gate above 0, ``router/active_experts``, how many of them a token has, and
    ``router/threshold_mean``; without one ``router/above_half_rate/NAME`` and ``router/above_half_experts``, for a gate
    above 0.5.

    Of the routers that weight the copies of an expert, three figures an expert (eight copies on five projections would
    be forty numbers): ``router/active_copies/NAME``, how many copies a token gives a weight above 0;
    ``router/largest_share/NAME``, the part of all weight that goes to the copy of a block that has most;
    ``router/load_entropy/NAME``, the entropy of the copies' parts over its maximum, 1 where all have the same and 0
    where one has everything.

    With balance losses ``router/balance_loss``, the sum over all routers of all blocks before its coefficient, the
    mean of the observed passes.

    It warns once when an expert is dead and once when a gate is saturated; see `moa_peft.training.router_health`.

    Padding does not count; gates of a whole instance count once a row. The numbers of the training are not touched,
    and nothing waits for the device before the figures are collected. A mixture without a router gives no figures, nor
    does ``logging_strategy`` "epoch".

    Args:
        model: The model that is trained; its forward is called with ``attention_mask``, unless rows are packed.
        layers: Its mixture layers, by name.
    """

    def __init__(self, model: nn.Module, layers: Sequence[tuple[str, MoALayer]]) -> None:
        self._model = model
        self._layers = layers
        self._mask: Tensor | None = None
        self._hook: Any = None
        self._sums: dict[str, dict[tuple[int, str], Tensor]] = {}  # by kind of sum, then as in Sums
        self._names: dict[tuple[int, str], tuple[str, ...]] = {}
        self._trouble = TroubleWatch()
        self._step, self._warns = 0, True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to observe if the step that begins will be logged."""
        step = state.global_step + 1
        self._step, self._warns = step, state.is_world_process_zero
        logged = step % max(state.logging_steps, 1) == 0 or (step == 1 and args.logging_first_step)
        if args.logging_strategy != IntervalStrategy.STEPS or not logged:
            return
        self._hook = self._model.register_forward_pre_hook(self._note_mask, with_kwargs=True)
        for _, layer in self._layers:
            layer.observer = partial(self._observe, layer.block.index)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop to observe."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook, self._mask = None, None
        for _, layer in self._layers:
            layer.observer = None

    def collect(self) -> dict[str, float]:
        """Give the figures observed since the last call, and forget them. Waits for the device once."""
        observed, self._sums = self._sums, {}
        if not observed:
            return {}
        tensors = [one for sums in observed.values() for one in sums.values()]
        numbers = iter(torch.cat([one.to(tensors[0].device) for one in tensors]).tolist())
        read: dict[str, Sums] = {
            kind: {key: [next(numbers) for _ in range(len(one))] for key, one in sums.items()}
            for kind, sums in observed.items()
        }
        if self._warns:
            self._trouble.look(read.pop("trouble", {}), self._names, self._step)
        figures: dict[str, float] = {}
        if "expert" in read:
            figures |= _expert_figures(read["expert"], "active" if "threshold" in read else "above_half")
        if "threshold" in read:
            means = [total / max(count, 1) for total, count in read["threshold"].values()]
            figures["router/threshold_mean"] = sum(means) / len(means)
        figures |= _copy_figures(read.get("copies", {}))
        if "balance" in read:
            figures["router/balance_loss"] = sum(total / passes for total, passes in read["balance"].values())
        return figures

    def _note_mask(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _observe(self, layer: int, record: GateRecord) -> None:
        gates = record.gates  # [B, T, E]
        real = gates.new_ones(gates.shape[:2])  # [B, T]
        if self._mask is not None and gates.shape[1] > 1:  # a whole instance's gates have no padding
            real = self._mask.to(gates)
        self._names[layer, record.router] = record.names
        self._add("trouble", layer, record.router, trouble_sums(gates, real))
        on_copies = record.router != ""
        active = (gates > (0.5 if record.threshold is None and not on_copies else 0.0)).to(gates)
        weight = real.unsqueeze(-1)
        count = real.sum()
        sums = torch.stack([(gates * weight).sum((0, 1)), (active * weight).sum((0, 1))])  # [2, E]
        if record.balance_loss is not None:
            loss = record.balance_loss
            self._add("balance", layer, record.router, torch.stack([loss, torch.ones_like(loss)]))
        if on_copies:
            of_all = torch.stack([sums[1].sum(), count])
            self._add("copies", layer, record.router, torch.cat([sums[0], of_all]))
            return
        for place, name in enumerate(record.names):
            self._add("expert", layer, name, torch.stack([*sums[:, place].unbind(), count]))
        if record.threshold is not None:
            total = (record.threshold * weight).sum()
            self._add("threshold", layer, "", torch.stack([total, count]))

    def _add(self, kind: str, layer: int, name: str, values: Tensor) -> None:
        sums = self._sums.setdefault(kind, {})
        sums[layer, name] = sums.get((layer, name), 0) + values


def _expert_figures(by_place: Sums, word: str) -> dict[str, float]:
    """Figures of the blocks' experts from their sums of gate, of active tokens, of tokens."""
    layers = {layer for layer, _ in by_place}
    figures: dict[str, float] = {}
    active = 0.0
    for name in dict.fromkeys(name for _, name in by_place):
        rows = [row for (_, one), row in by_place.items() if one == name]
        figures[f"router/gate_mean/{name}"] = sum(gate / max(count, 1) for gate, _, count in rows) / len(rows)
        rates = [rate / max(count, 1) for _, rate, count in rows]
        figures[f"router/{word}_rate/{name}"] = sum(rates) / len(rates)
        active += sum(rates)
    figures[f"router/{word}_experts"] = active / len(layers)
    return figures


def _copy_figures(by_router: Sums) -> dict[str, float]:
    """Figures of the copies of an expert from their sums of weights, and of active copies and tokens."""
    figures: dict[str, float] = {}
    for name in dict.fromkeys(name for _, name in by_router):
        rows = [row for (_, one), row in by_router.items() if one == name]
        shares = [[weight / (sum(weights) or 1) for weight in weights] for *weights, _, _ in rows]
        entropies = [_entropy(block) / math.log(max(len(block), 2)) for block in shares]
        figures[f"router/active_copies/{name}"] = sum(on / max(count, 1) for *_, on, count in rows) / len(
            rows
        )
        figures[f"router/largest_share/{name}"] = sum(max(block) for block in shares) / len(rows)
        figures[f"router/load_entropy/{name}"] = sum(entropies) / len(rows)
    return figures


def _entropy(shares: Sequence[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


def trouble_sums(gates: Tensor, real: Tensor) -> Tensor:
    """Sum up what dead experts and saturated gates are recognised by.

    Args:
        gates: Float32, [B, T, E].
        real: Float, broadcastable to [B, T], 1 for tokens that count.

    Returns:
        Float, [2 E + 1]: each gate's sum, the tokens that it is stuck for, and the number of tokens.
    """
    weight = real.unsqueeze(-1)
    stuck = (gates > STUCK).to(gates) * weight
    return torch.cat([(gates * weight).sum((0, 1)), stuck.sum((0, 1)), real.sum().reshape(1)])


def is_dead(mean_gate: float, num_gates: int) -> bool:
    """Whether a mean gate is that of an expert that is never used. Of many gates that sum to 1, each is small."""
    return mean_gate < min(DEAD, 0.08 / num_gates)


def expert_name(router: str, name: str) -> str:
    """Call an expert, or a copy of one, by one name."""
    return f"copy {name} of {router}" if router else name


def find_trouble(
    sums: Mapping[Where, Sequence[float]], names: Mapping[Where, Sequence[str]]
) -> dict[str, list[str]]:
    """Find dead experts and saturated gates.

    Args:
        sums: From `trouble_sums`, by router.
        names: What each router weights.

    Returns:
        Experts in words, under "dead" and "saturated"; routers of one expert and those seen too little are left out.
    """
    found: dict[str, list[str]] = {"dead": [], "saturated": []}
    for (layer, router), values in sums.items():
        experts, tokens = names[layer, router], values[-1]
        if tokens < FEWEST or len(experts) < 2:
            continue
        for place, name in enumerate(experts):
            said = expert_name(router, name)
            if is_dead(values[place] / tokens, len(experts)):
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
        """Warn of problems in the sums up to a step that were not reported before."""
        for kind, places in find_trouble(sums, names).items():
            if places and kind not in self._said:
                self._said.add(kind)
                tqdm.write(warning(kind, places, step), file=sys.stderr)


def warning(kind: str, places: Sequence[str], step: int) -> str:
    """The text of a warning, in one line."""
    what = {
        "dead": f"never used: {_listed(places)} (mean gate below {DEAD})",
        "saturated": f"saturated: the gate of {_listed(places)} is above {STUCK} for most tokens, so it hardly learns",
    }
    return f"moa: warning: step {step}: {what[kind]}; {ADVICE[kind]}; `moa inspect` shows more"


def _listed(places: Sequence[str], most: int = 3) -> str:
    rest = len(places) - most
    return ", ".join(places[:most]) + (f" and {rest} more" if rest > 0 else "")
