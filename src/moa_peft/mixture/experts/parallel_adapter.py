"""The parallel adapter: a bottleneck network beside a block's MLP."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from moa_peft.mixture.config import CopiedExpertConfig
from moa_peft.mixture.experts.base import Bottleneck, LinearExpert, register_expert

if TYPE_CHECKING:
    from moa_peft.mixture.sites import LinearSite


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

    The N copies are stacked: ``down_weight`` [N * size, D_in], ``up_weight`` [D_out, N * size], ``up_bias`` [D_out * N],
    a column for each; with ``shared``, the down-projection is one for all.

    Source: MoA, arXiv 2506.05928, after He et al., arXiv 2110.04366.
    """

    def __init__(self, config: ParallelAdapterExpert, in_features: int, out_features: int) -> None:
        super().__init__()
        size, copies = config.size, config.num_experts
        rows = size if config.shared else copies * size
        self.down_weight = nn.Parameter(torch.empty(rows, in_features))
        self.down_bias = nn.Parameter(torch.zeros(rows))
        self.up_weight = nn.Parameter(torch.empty(out_features, copies * size))
        self.up_bias = nn.Parameter(torch.zeros(out_features * copies))
        for weight in (*self.down_weight.data.split(size), *self.up_weight.data.split(size, 1)):
            nn.init.xavier_uniform_(weight, gain=1e-4)

    def bottleneck(self) -> Bottleneck:
        """The stacked networks."""
        return Bottleneck(
            down=self.down_weight,
            up=self.up_weight,
            down_bias=self.down_bias,
            up_bias=self.up_bias.view(len(self.up_weight), -1),
            activation=F.silu,
        )
