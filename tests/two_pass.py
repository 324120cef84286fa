"""The statistics of a model's mixtures as their definitions say: every token kept, text by text, in two passes."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moa_peft import ChangeRecord, GateRecord, mixture_layers
from moa_peft.inspection.forward_pass import TokenText

LENGTHS = (5, 11, 1, 8, 3)


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[TokenText]:
    """Random tokens in texts of unequal lengths, each token with a class."""
    draw = torch.Generator().manual_seed(3)
    return [
        TokenText(
            ids=tuple(torch.randint(3, 97, (length,), generator=draw).tolist()),
            classes=tuple(torch.randint(0, 5, (length,), generator=draw).tolist()),
        )
        for length in lengths
    ]


@dataclass
class Kept:
    """Every gate and change of every token, by (adapter, layer, router) and name."""

    gates: dict[Any, Any] = field(default_factory=lambda: defaultdict(list))
    thresholds: dict[Any, Any] = field(default_factory=lambda: defaultdict(list))
    changes: dict[Any, Any] = field(default_factory=lambda: defaultdict(list))


def keep_everything(model: Any, read: list[TokenText]) -> Kept:
    """Read each text alone, without padding, and keep what is heard."""
    kept = Kept()

    def gates(layer: int, record: GateRecord) -> None:
        where = (record.adapter, layer, record.router)
        kept.gates[where].append(record.gates[0])
        if record.threshold is not None:
            kept.thresholds[where].append(record.threshold.expand(1, record.gates.shape[1], 1)[0, :, 0])

    def changes(layer: int, record: ChangeRecord) -> None:
        kept.changes[record.adapter, layer, "", record.expert].append(record.change[0].flatten(1))
        copies = record.gate.shape[-1]
        for copy in range(copies if copies > 1 else 0):
            alone = record.under(record.gate * torch.eye(copies)[copy])[0].flatten(1)
            kept.changes[record.adapter, layer, record.expert, str(copy)].append(alone)

    for number, (_, layer) in enumerate(mixture_layers(model)):
        layer.observer, layer.change_observer = partial(gates, number), partial(changes, number)
    with torch.no_grad():
        for one in read:
            model(torch.tensor([one.ids]))
    for _, layer in mixture_layers(model):
        layer.observer = layer.change_observer = None
    for found in (kept.gates, kept.thresholds, kept.changes):
        for key, parts in found.items():
            found[key] = torch.cat(parts).double()
    return kept


def cka(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(0), b - b.mean(0)
    return float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))


def rank(change: Tensor) -> float:
    sizes = torch.linalg.svdvals(change)
    share = sizes / sizes.sum()
    return math.exp(-float(torch.xlogy(share, share).sum()))
