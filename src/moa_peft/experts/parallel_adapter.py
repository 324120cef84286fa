"""The parallel adapter: a bottleneck network beside a block's MLP."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_peft.config import CopiedExpertConfig
from moa_peft.experts.base import Bottleneck, LinearExpert, register_expert

if TYPE_CHECKING:
    from moa_peft.architecture import LinearSite


@register_expert
@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelAdapterExpert(CopiedExpertConfig):
    """A bottleneck network that reads the MLP's input and is added to the MLP's output."""

    kind: ClassVar[str] = "parallel_adapter"

    size: int = 16
    """Inner size of the bottleneck."""

    shared: bool = False
    """Several copies: one down-projection for all of them and an up-projection for each, instead of a pair for each."""

    def problems(self) -> list[str]:
        """What is wrong with the fields, a sentence each."""
        wrong = self.copy_problems()
        if self.shared and self.num_experts == 1:
            wrong.append("shared is true: a single adapter shares nothing; give num_experts above 1")
        return wrong if self.size >= 1 else [*wrong, f"size is {self.size}: it must be at least 1"]

    def site_names(self) -> tuple[str, ...]:
        """One expert beside the MLP."""
        return ("mlp",)

    def build(self, site: "LinearSite") -> "BottleneckChange":
        """Make one parallel adapter."""
        return BottleneckChange(self, site.in_features, site.out_features)


class BottleneckChange(LinearExpert):
    """``sum_n gate_n (W_up,n SiLU(W_down,n h + b_down,n) + b_up,n)``, Xavier-uniform with gain 1e-4, biases zero.

    The N copies are stacked: ``down.weight`` [N * size, D_in], ``up.weight`` [D_out, N * size], ``up.bias`` [D_out * N],
    a column for each; with ``shared``, ``down`` is one for all.

    Source: MoA, arXiv 2506.05928, after He et al., arXiv 2110.04366.
    """

    starts_at_zero: ClassVar[bool] = False

    def __init__(self, config: ParallelAdapterExpert, in_features: int, out_features: int) -> None:
        super().__init__()
        copies = config.num_experts
        self.size = config.size
        self.copies = copies
        self.down = nn.Linear(in_features, config.size if config.shared else copies * config.size)
        self.up = nn.Linear(copies * config.size, out_features)
        self.up.bias = nn.Parameter(torch.empty(out_features * copies))
        for weight in (*self.down.weight.data.split(config.size), *self.up.weight.data.split(config.size, 1)):
            nn.init.xavier_uniform_(weight, gain=1e-4)
        for linear in (self.down, self.up):
            nn.init.zeros_(linear.bias)

    def change(self, x: Tensor, base: Tensor, gate: Tensor) -> Tensor:
        """Give the gated change of the MLP's output; see `LinearExpert.change`."""
        inner = F.silu(F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype)))
        gate = gate.expand(*inner.shape[:-1], self.copies)  # [B, T, N]
        gated = (inner.unflatten(-1, (-1, self.size)) * gate.unsqueeze(-1)).flatten(-2)  # [B, T, N * size]
        # The gated biases ride along as more columns, so that one product makes the whole change.
        gated = torch.cat([gated, gate], dim=-1).to(base.dtype)
        up = torch.cat([self.up.weight, self.up.bias.unflatten(0, (-1, self.copies))], dim=1)
        return F.linear(gated, up.to(base.dtype))

    @property
    def is_bottleneck(self) -> bool:
        """It is one."""
        return True

    def bottleneck(self) -> Bottleneck:
        """The stacked networks."""
        return Bottleneck(
            down=self.down.weight,
            up=self.up.weight,
            down_bias=self.down.bias,
            up_bias=self.up.bias,
            activation=F.silu,
        )
