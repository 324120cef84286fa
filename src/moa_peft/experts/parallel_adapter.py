"""The parallel adapter: a bottleneck network beside a block's MLP."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_peft.config import ExpertConfig
from moa_peft.experts.base import LinearExpert, register_expert

if TYPE_CHECKING:
    from moa_peft.architecture import LinearSite


@register_expert
@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelAdapterExpert(ExpertConfig):
    """A bottleneck network that reads the MLP's input and is added to the MLP's output."""

    kind: ClassVar[str] = "parallel_adapter"

    size: int = 16
    """Inner size of the bottleneck."""

    def problems(self) -> list[str]:
        """What is wrong with the fields, a sentence each."""
        return [] if self.size >= 1 else [f"size is {self.size}: it must be at least 1"]

    def site_names(self) -> tuple[str, ...]:
        """One expert beside the MLP."""
        return ("mlp",)

    def build(self, site: "LinearSite") -> "BottleneckChange":
        """Make one parallel adapter."""
        return BottleneckChange(self, site.in_features, site.out_features)


class BottleneckChange(LinearExpert):
    """``gate * (W_up SiLU(W_down h + b_down) + b_up)``, weights Xavier-uniform with gain 1e-4, biases zero.

    Source: MoA, arXiv 2506.05928, after He et al., arXiv 2110.04366.
    """

    starts_at_zero: ClassVar[bool] = False

    def __init__(self, config: ParallelAdapterExpert, in_features: int, out_features: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, config.size)
        self.up = nn.Linear(config.size, out_features)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight, gain=1e-4)
            nn.init.zeros_(linear.bias)

    def change(self, x: Tensor, base: Tensor, gate: Tensor) -> Tensor:
        """Give the gated change of the MLP's output; see `LinearExpert.change`."""
        inner = F.silu(F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype)))  # [B, T, size]
        # The gated bias rides along as one more column, so that one product makes the whole change.
        gated = torch.cat([inner * gate, gate], dim=-1).to(base.dtype)
        up = torch.cat([self.up.weight, self.up.bias.unsqueeze(1)], dim=1)
        return F.linear(gated, up.to(base.dtype))
