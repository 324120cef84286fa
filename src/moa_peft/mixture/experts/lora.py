"""The LoRA expert: a low-rank change beside one linear projection."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_peft.mixture.config import CopiedExpertConfig
from moa_peft.mixture.experts.base import (
    PROJECTIONS,
    Bottleneck,
    LinearExpert,
    register_expert,
    target_problems,
)

if TYPE_CHECKING:
    from moa_peft.mixture.sites import LinearSite


@register_expert
@dataclass(frozen=True, kw_only=True, slots=True)
class LoraExpert(CopiedExpertConfig):
    """LoRA on each of ``targets``, each an expert with a gate of its own; one, or several copies under a router."""

    kind: ClassVar[str] = "lora"

    targets: Sequence[str]
    """Projections, by the names they have in Llama: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."""

    rank: int = 8
    """Inner size of each LoRA."""

    alpha: float = 8.0
    """The change is scaled by alpha / rank, or by alpha / sqrt(rank) with ``rslora``."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank), as rank-stabilized LoRA does (arXiv 2312.03732)."""

    dropout: float = 0.0
    """Share of the input's entries dropped while training, in [0, 1)."""

    shared: bool = False
    """Several copies: one A for all of them and a B for each (HydraLoRA), instead of a pair for each."""

    def problems(self) -> list[str]:
        """What is wrong with the fields, a sentence each."""
        wrong = target_problems(self.targets, PROJECTIONS) + self.copy_problems()
        if self.shared and self.num_experts == 1:
            wrong.append("shared is true: a single LoRA shares nothing; give num_experts above 1")
        if self.rank < 1:
            wrong.append(f"rank is {self.rank}: it must be at least 1")
        if not self.alpha > 0:
            wrong.append(f"alpha is {self.alpha}: it must be above 0")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout is {self.dropout}: it must lie in [0, 1)")
        return wrong

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def build(self, site: "LinearSite") -> "LowRankChange":
        """Make one LoRA."""
        return LowRankChange(self, site.in_features, site.out_features)


class LowRankChange(LinearExpert):
    """``scale * sum_n gate_n B_n A_n x``: A [N * r, D_in] Kaiming-uniform, B [D_out, N * r] zero.

    The N copies are stacked, so that there are two products whatever N; with ``shared``, A is [r, D_in], one for all.

    Source: LoRA, arXiv 2106.09685; MoA, arXiv 2506.05928; shared: HydraLoRA, arXiv 2404.19245.
    """

    lora_b: ClassVar[frozenset[str]] = frozenset({"B"})

    def __init__(self, config: LoraExpert, in_features: int, out_features: int) -> None:
        super().__init__()
        self.rank = config.rank
        self.scale = config.scale
        self.dropout = config.dropout
        rows = config.rank if config.shared else config.num_experts * config.rank
        self.A = nn.Parameter(torch.empty(rows, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, config.num_experts * config.rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def change(self, x: Tensor, base: Tensor, gate: Tensor) -> Tensor:
        """Give ``B (gate * scale * A dropout(x))``; see `LinearExpert.change`."""
        x = F.dropout(x, self.dropout, self.training)
        rows = self._weights().gated(F.linear(x, self.A.to(x.dtype)), gate)
        return F.linear(rows.to(base.dtype), self.B.to(base.dtype))

    def bottleneck(self) -> Bottleneck | None:
        """A and B; with dropout it is none, since each LoRA then reads an input of its own."""
        return self._weights() if self.dropout == 0 else None

    def _weights(self) -> Bottleneck:
        return Bottleneck(down=self.A, up=self.B, scale=self.scale)
