"""The prompt expert: learned vectors that a block's queries attend to beside the text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from moa_peft.mixture.config import CopiedExpertConfig
from moa_peft.mixture.experts.base import AttentionExpert, Prompt, register_expert

if TYPE_CHECKING:
    from moa_peft.mixture.sites import AttentionSite


@register_expert
@dataclass(frozen=True, kw_only=True, slots=True)
class PromptExpert(CopiedExpertConfig):
    """Zero-initialised gated attention to a learned prompt."""

    kind: ClassVar[str] = "prompt"

    length: int = 10
    """Number of learned vectors in each block."""

    def problems(self) -> list[str]:
        """What is wrong with the fields, a sentence each."""
        wrong = self.copy_problems()
        return wrong if self.length >= 1 else [*wrong, f"length is {self.length}: it must be at least 1"]

    def site_names(self) -> tuple[str, ...]:
        """One expert beside the attention."""
        return ("attention",)

    def build(self, site: "AttentionSite") -> "PromptChange":
        """Make one prompt."""
        return PromptChange(self, site.hidden_size, site.num_heads)


class PromptChange(AttentionExpert):
    """``c_h * sum_n gate_n softmax(Q_h K_P^T * scaling)_n V_P``: K_P, V_P are the frozen projections of N * L vectors.

    The vectors are N(0, 1) at first, the scalar c_h of each head 0. The prompt has its own softmax, one over the vectors
    of all N copies, and no rotary embedding; keys pass the model's k-norm where it has one.

    Source: LLaMA-Adapter, arXiv 2303.16199; MoA, arXiv 2506.05928. Departures: the scaling is the model's own
    (1 / sqrt(head size) in Llama and Qwen3, where the official code runs; another in Gemma), and the logit soft cap
    of Gemma 2 is left out.
    """

    undecayed: ClassVar[frozenset[str]] = frozenset({"vectors", "head_scale"})

    def __init__(self, config: PromptExpert, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.length = config.length
        self.vectors = nn.Parameter(torch.randn(config.num_experts * config.length, hidden_size))
        self.head_scale = nn.Parameter(torch.zeros(num_heads))

    def prompt(self, site: "AttentionSite", dtype: torch.dtype) -> Prompt:
        """The frozen projections of the vectors."""
        keys, values = site.project(self.vectors.to(dtype))
        # under autocast a k-norm gives another dtype
        return Prompt(keys.to(dtype), values.to(dtype), self.head_scale)
