"""Observes a model's mixtures: the gates of their routers and the changes of their experts, for the real tokens of each call.

Sizes: B rows, T tokens of a row, n real tokens of a batch, E experts, N copies of an expert, D outputs of a site.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moa_peft.inspection.gate_statistics import GateSums, gate_sums
from moa_peft.inspection.similarity import Change, ChangeSums
from moa_peft.mixture.block_hooks import ChangeRecord, GateRecord, MoALayer, mixture_layers
from moa_peft.mixture.sites import AttentionSite, LinearSite


class Where(NamedTuple):
    """One router of a model, or the group of experts that it weights."""

    adapter: str
    layer: int
    """The block's place in the model, from 0."""
    router: str
    """"" for the block's, an expert's name for that of its copies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What the observer must know of a call to exclude its padding."""

    mask: Tensor
    """Bool, [B, T], False at padding."""
    positions: Tensor | None = None
    """Int64, [n], each real token's place in its text, row by row."""
    classes: Tensor | None = None
    """Int64, [n], places in `CLASSES`."""


@dataclass(kw_only=True)
class Observed:
    """Gates and changes of one batch."""

    gates: dict[Where, Tensor] = field(default_factory=dict)
    """Float32, [n, E]; [B, E] where a whole instance has the same."""
    changes: dict[Where, dict[str, Change]] = field(default_factory=dict)
    """By expert or copy."""


class Observer:
    """Statistics of a model's gates and changes, in memory that does not depend on the number of calls.

    Args:
        model: A model with a mixture, in PEFT's wrapper or loaded by transformers alone.

    Attributes:
        names: What each router weights.
        gates: Sums of gates by router.
        groups: Sums of changes: of the experts of each block under the router "", and of the copies of each expert.
        observed: Gates and changes of the latest batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[MoALayer] = [layer for _, layer in mixture_layers(model)]
        self._batch: Batch | None = None
        self.names: dict[Where, tuple[str, ...]] = {}
        self.gates: dict[Where, GateSums] = {}
        self.groups: dict[Where, ChangeSums] = {}
        self.observed = Observed()

    @contextmanager
    def observing(self, batch: Batch) -> Iterator[Observed]:
        """Observe one call of the model, made inside the block, and add it to the sums at the end.

        Yields:
            Gates and changes; complete when the call is done.
        """
        before = [(layer.observer, layer.change_observer) for layer in self._layers]
        self._batch, self.observed = batch, Observed()
        for layer in self._layers:
            layer.observer = partial(self._note_gates, layer)
            layer.change_observer = partial(self._note_change, layer)
        try:
            yield self.observed
            for where, changes in self.observed.changes.items():
                self.groups[where].add(changes)
        finally:
            self._batch = None
            for layer, (gates, changed) in zip(self._layers, before, strict=True):
                layer.observer, layer.change_observer = gates, changed

    def _note_gates(self, layer: MoALayer, record: GateRecord) -> None:
        assert self._batch is not None, "observers are set while a batch is observed"
        batch = self._batch
        where = Where(record.adapter, layer.block.index, record.router)
        router = layer.mixtures()[record.adapter].routers()[record.router]
        whole = router.config.granularity == "instance"
        device = record.gates.device  # of the block, where a device_map may have put it
        mask, positions, classes = (
            None if one is None else one.to(device) for one in (batch.mask, batch.positions, batch.classes)
        )
        gates = record.gates[:, 0] if whole else record.gates[mask]  # [B, E] or [n, E]
        threshold: Tensor | None = None
        if record.threshold is not None:
            spread = record.threshold.expand(*record.gates.shape[:2], 1)
            threshold = (spread[:, 0] if whole else spread[mask]).squeeze(-1)
        sums = gate_sums(
            gates,
            threshold=threshold,
            positions=None if whole else positions,
            classes=None if whole else classes,
        )
        self.names[where] = record.names
        self.gates[where] = self.gates[where] + sums if where in self.gates else sums
        self.observed.gates[where] = gates

    def _note_change(self, layer: MoALayer, record: ChangeRecord) -> None:
        places = layer.mixtures()[record.adapter].places
        place = next(one for one in places if one.name == record.expert)
        block = Where(record.adapter, layer.block.index, "")
        self._reduce(block, {one.name: _output(one.site) for one in places}, place.name, record.change)
        copies = record.gate.shape[-1]
        if copies == 1:
            return
        site = Where(record.adapter, layer.block.index, place.name)
        outputs: dict[str, Hashable] = {str(copy): "" for copy in range(copies)}
        for copy in range(copies):
            alone = torch.zeros_like(record.gate)
            alone[..., copy] = record.gate[..., copy]
            self._reduce(site, outputs, str(copy), record.under(alone))

    def _reduce(self, where: Where, outputs: dict[str, Hashable], name: str, change: Tensor) -> None:
        assert self._batch is not None, "observers are set while a batch is observed"
        if where not in self.groups:
            self.groups[where] = ChangeSums(outputs)
        rows = change.flatten(2)[self._batch.mask.to(change.device)]  # [n, D]
        self.observed.changes.setdefault(where, {})[name] = self.groups[where].reduce(name, rows)


def _output(site: LinearSite | AttentionSite) -> Hashable:
    """What an expert at a site adds to. The last projection of an MLP gives the MLP's output."""
    if site.name in ("mlp", "down_proj"):
        return "mlp"
    return site.path, getattr(site, "slot", None)
