# ruff: noqa: ARG002  # a callback of the trainer is given more than it needs
"""What the routers do, as figures for the training log."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy


class Gates(Protocol):
    """The gates of one block in one forward pass, as `moa_peft.GateRecord` holds them."""

    names: tuple[str, ...]
    gates: Tensor
    threshold: Tensor | None


class Observed(Protocol):
    """A mixture layer that tells its gates."""

    observer: Callable[[Any], None] | None


class RouterFigures(TrainerCallback):
    """Observes the routers in the forward passes of logging steps and averages over tokens and blocks.

    For each expert ``router/gate_mean/NAME``. With a threshold ``router/active_rate/NAME``, the share of tokens with
    a gate above 0, ``router/active_experts``, how many of them a token has, and ``router/threshold_mean``; without
    one ``router/above_half_rate/NAME`` and ``router/above_half_experts``, for a gate above 0.5.

    Padding does not count. The numbers of the training are not touched, and nothing waits for the device before the
    figures are collected. With ``logging_strategy`` "epoch" there are no figures.

    Args:
        model: The model that is trained; its forward is called with ``attention_mask``, unless rows are packed.
        layers: Its mixture layers, by name.
    """

    def __init__(self, model: nn.Module, layers: Sequence[tuple[str, Observed]]) -> None:
        self._model = model
        self._layers = layers
        self._mask: Tensor | None = None
        self._hook: Any = None
        self._sums: dict[tuple[int, str], Tensor] = {}  # by layer and expert: gate, active, count
        self._thresholds: dict[int, Tensor] = {}  # by layer: threshold, count

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to observe if the step that begins will be logged."""
        step = state.global_step + 1
        logged = step % max(state.logging_steps, 1) == 0 or (step == 1 and args.logging_first_step)
        if args.logging_strategy != IntervalStrategy.STEPS or not logged:
            return
        self._hook = self._model.register_forward_pre_hook(self._note_mask, with_kwargs=True)
        for number, (_, layer) in enumerate(self._layers):
            layer.observer = partial(self._observe, number)

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
        if not self._sums:
            return {}
        rows = torch.stack([*self._sums.values()]).tolist()
        by_place = dict(zip(self._sums, rows, strict=True))
        sparse = bool(self._thresholds)
        figures = _expert_figures(by_place, "active" if sparse else "above_half")
        if sparse:
            means = torch.stack([*self._thresholds.values()]).tolist()
            figures["router/threshold_mean"] = sum(total / max(count, 1) for total, count in means) / len(
                means
            )
        self._sums, self._thresholds = {}, {}
        return figures

    def _note_mask(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _observe(self, layer: int, record: Gates) -> None:
        gates = record.gates.detach()  # [B, T, E]
        real = gates.new_ones(gates.shape[:2]) if self._mask is None else self._mask.to(gates)  # [B, T]
        active = (gates > (0.5 if record.threshold is None else 0.0)).to(gates)
        weight = real.unsqueeze(-1)
        count = real.sum()
        sums = torch.stack([(gates * weight).sum((0, 1)), (active * weight).sum((0, 1))])  # [2, E]
        for place, name in enumerate(record.names):
            key = (layer, name)
            self._sums[key] = self._sums.get(key, 0) + torch.stack([*sums[:, place].unbind(), count])
        if record.threshold is not None:
            total = (record.threshold.detach().float() * weight).sum()
            self._thresholds[layer] = self._thresholds.get(layer, 0) + torch.stack([total, count])


def _expert_figures(by_place: Mapping[tuple[int, str], list[float]], word: str) -> dict[str, float]:
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
