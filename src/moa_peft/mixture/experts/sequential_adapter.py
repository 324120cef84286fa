"""The sequential adapter: a bottleneck network after a module."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_peft.mixture.config import ExpertConfig
from moa_peft.mixture.experts.base import LinearExpert, register_expert, target_problems

if TYPE_CHECKING:
    from moa_peft.mixture.sites import LinearSite

PLACES = ("o_proj", "mlp")


@register_expert
@dataclass(frozen=True, kw_only=True, slots=True)
class SequentialAdapterExpert(ExpertConfig):
    """A bottleneck network that reads what the attention or the MLP gives and adds to it, each with a gate of its own."""

    kind: ClassVar[str] = "sequential_adapter"

    targets: Sequence[str] = ("mlp",)
    """After which modules: mlp, and o_proj for the attention's output."""

    size: int = 16
    """Inner size of the bottleneck."""

    def problems(self) -> list[str]:
        """What is wrong with the fields, a sentence each."""
        wrong = target_problems(self.targets, PLACES) or [
            f"targets names {one!r}: give some of {', '.join(PLACES)}"
            for one in self.targets
            if one not in PLACES
        ]
        return wrong if self.size >= 1 else [*wrong, f"size is {self.size}: it must be at least 1"]

    def build(self, site: "LinearSite") -> "SequentialChange":
        """Make one sequential adapter."""
        return SequentialChange(self.size, site.out_features)


class SequentialChange(LinearExpert):
    """``gate * (W_up GELU(W_down base + b_down) + b_up)``: W_down N(0, 0.01^2), W_up and the biases zero at first.

    It reads the frozen output: other experts at the same module do not change what it sees.

    Source: Houlsby et al., arXiv 1902.00751. Departures: W_up starts at zero, not near it, so that a fresh model is the
    frozen one; the layer norms of the base stay frozen.
    """

    def __init__(self, size: int, features: int) -> None:
        super().__init__()
        self.down_weight = nn.Parameter(torch.empty(size, features))
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up_weight = nn.Parameter(torch.zeros(features, size))
        self.up_bias = nn.Parameter(torch.zeros(features))
        nn.init.trunc_normal_(self.down_weight, std=0.01, a=-0.02, b=0.02)

    def change(self, x: Tensor, base: Tensor, gate: Tensor) -> Tensor:  # noqa: ARG002  # it reads the output
        """Give ``W_up (gate * inner) + gate * b_up``; see `LinearExpert.change`."""
        dtype = base.dtype
        inner = F.gelu(F.linear(base, self.down_weight.to(dtype), self.down_bias.to(dtype)))
        raised = F.linear((gate * inner).to(dtype), self.up_weight.to(dtype))
        return raised + (gate * self.up_bias).to(dtype)
