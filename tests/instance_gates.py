"""Looks at the gates that a model makes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moa_peft import mixture_layers


class Seen:
    """The gates of each block, in each call that made any."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Tensor] = []
        self._blocks: list[Tensor] = []
        self._count = len(mixture_layers(model))

    def __call__(self, record: Any) -> None:
        self._blocks.append(record.gates)
        if len(self._blocks) == self._count:
            self.calls.append(torch.stack(self._blocks, dim=1)[:, :, 0])  # [B, blocks, C]
            self._blocks = []


@contextmanager
def watching(model: nn.Module) -> Iterator[Seen]:
    seen = Seen(model)
    for _, layer in mixture_layers(model):
        layer.observer = seen
    yield seen
    for _, layer in mixture_layers(model):
        layer.observer = None


@torch.no_grad()
def gates(model: nn.Module, **call: Any) -> Tensor:
    """The gates of one call, [B, blocks, C]."""
    with watching(model) as seen:
        model(**call)
    (found,) = seen.calls
    return found


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-6)
