"""Weights that lie side by side in memory, so that one product with all of them needs no copy of them.

As with torch's recurrent layers, each stays a parameter of its own, whose data is a part of one tensor. Where somebody has
given a parameter other data since (a sharding, a copy of the model, a load that replaces it), that is noticed, and weights
are joined by copying.

Sizes: K rows of all weights that read one input, D_in of that input.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moa_peft.fused import Joined
from moa_peft.plan import Plan, Sources


def lay_readers(plan: Plan) -> None:
    """Lay the weights of everything that reads one input side by side, input by input; those laid before stay where they are."""
    for name in plan.readers:
        if name not in plan.mixture.side_by_side:
            beside = plan.mixture.side_by_side[name] = SideBySide(plan.sources_of(name))
            beside.lay()


@dataclass(frozen=True, slots=True)
class _Cut:
    """How what is shaped like the joined tensors falls into parts."""

    sizes: list[int]
    """Rows of each weight."""
    bias_sizes: list[int]
    """Rows of each bias, and of each gap where there is none."""
    biases: list[int]
    """Which of those are biases."""

    def __call__(self, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Give the part of each parameter."""
        parts = list(weight.split_with_sizes(self.sizes))
        if bias is None:
            return parts
        rows = bias.view(-1).split_with_sizes(self.bias_sizes)
        return parts + [rows[place] for place in self.biases]


@dataclass(frozen=True, slots=True)
class _Laid:
    """Parameters in their places."""

    parameters: list[Tensor]
    """Weights, then biases."""
    addresses: list[int]
    weight: Tensor
    """All weights, [K, D_in]."""
    bias: Tensor | None
    """All biases, [K, 1], zero for who has none; None where nobody has one."""
    cut: _Cut


class SideBySide:
    """The weights of everything that reads one input, and their biases.

    Args:
        sources: Where they are.

    Attributes:
        sources: As given.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self._laid: _Laid | None = None

    @torch.inference_mode(False)
    def lay(self) -> None:
        """Give the parameters their places, if they are several that can lie side by side."""
        self._laid = None
        parameters = self.sources.tensors() or []
        count, entries = len(self.sources.weights), self.sources.biases or ()
        weights, biases = parameters[:count], parameters[count:]
        if len(weights) < 2 or not _can_lie(weights, biases):
            return
        cut = _Cut(
            sizes=[len(one) for one in weights],
            bias_sizes=[one if isinstance(one, int) else len(one()) for one in entries],
            biases=[place for place, one in enumerate(entries) if not isinstance(one, int)],
        )
        rows = sum(cut.sizes)
        weight = weights[0].new_empty((rows, weights[0].shape[1]), requires_grad=False)
        bias = biases[0].new_zeros((rows, 1), requires_grad=False) if biases else None
        for parameter, part in zip(parameters, cut(weight, bias), strict=True):
            parameter.data = _apart(part.copy_(parameter.detach()))
        self._laid = _Laid(parameters, [one.data_ptr() for one in parameters], weight, bias, cut)

    def follow(self) -> None:
        """Lay parameters that lay side by side, and went to another device or dtype, again; leave others, as in shared memory."""
        if self._laid is None:
            return
        first, weight = self._laid.parameters[0], self._laid.weight
        if (first.device, first.dtype) != (weight.device, weight.dtype):
            self.lay()

    def lies(self) -> bool:
        """Whether the parameters are those that were laid, in their places."""
        if self._laid is None or not self.is_of(self.sources):
            return False
        return [one.data_ptr() for one in self._laid.parameters] == self._laid.addresses

    def is_of(self, sources: Sources) -> bool:
        """Whether the parameters that were laid are those of some sources."""
        found = sources.tensors()
        if self._laid is None or found is None or len(found) != len(self._laid.parameters):
            return False
        return all(map(operator.is_, found, self._laid.parameters))

    def joined(self) -> Joined | None:
        """Give all weights as one, with the parameters that gradients flow to; None where they do not lie side by side."""
        if not self.lies():
            self._laid = None  # it would hold memory that nobody uses
        laid = self._laid
        return None if laid is None else Joined(laid.weight, laid.bias, laid.parameters, laid.cut)

    def __getstate__(self) -> dict[str, Any]:
        return SideBySide(self.sources).__dict__  # the parameters of a copy have other places


def _can_lie(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    """Whether weights and biases may get other places.

    Only on a CPU: elsewhere a part of a block of memory cannot be given to other processes, nor can all devices cut one.
    """
    every = [*weights, *biases]
    if len({id(one) for one in every}) < len(every):  # one cannot be in two places
        return False
    kinds = {(one.dtype, one.shape[1:]) for one in weights}, {one.dtype for one in biases}
    return all(len(one) <= 1 for one in kinds) and all(
        type(one) is nn.Parameter
        and one.device.type == "cpu"
        and one.dim() == dim
        and one.numel() > 0
        and not one.is_inference()
        for tensors, dim in ((weights, 2), (biases, 1))
        for one in tensors
    )


def _apart(part: Tensor) -> Tensor:
    """Give a part of a tensor, in its place, a storage of its own: accelerate saves one alone of parameters that share one."""
    start = part.storage_offset() * part.element_size()
    own = part.untyped_storage()[start : start + part.nbytes]
    return part.new_empty(0).set_(own, 0, part.shape, part.stride())
