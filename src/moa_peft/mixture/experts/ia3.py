"""The (IA)^3 expert: a learned factor for each number that a projection gives or the MLP's last layer reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moa_peft.mixture.config import ExpertConfig
from moa_peft.mixture.experts.base import PROJECTIONS, LinearExpert, register_expert, target_problems
from moa_peft.mixture.sites import frozen_layer

if TYPE_CHECKING:
    from moa_peft.mixture.sites import LinearSite

RESCALED_INPUT = "down_proj"
"""The one projection whose input is rescaled: the MLP's inner activation."""


@register_expert
@dataclass(frozen=True, kw_only=True, slots=True)
class IA3Expert(ExpertConfig):
    """Learned factors on the outputs of projections and on the MLP's inner activation, each an expert with its gate."""

    kind: ClassVar[str] = "ia3"

    targets: Sequence[str] = ("k_proj", "v_proj", "down_proj")
    """Projections whose output is rescaled; at down_proj its input, which costs a second product. Where the MLP is gated (Llama), up_proj gives the same change without one."""

    def problems(self) -> list[str]:
        """What is wrong with the fields, a sentence each."""
        return target_problems(self.targets, PROJECTIONS)

    def build(self, site: "LinearSite") -> "RescaledChange":
        """Make the factors of one projection."""
        return RescaledChange(site)


class RescaledChange(LinearExpert):
    """``gate * s * base``; at down_proj ``gate * W (s * x)``: s, the factor's distance from 1, is zero at first.

    Source: (IA)^3, arXiv 2205.05638. Departure: ``s = l - 1`` is what is stored and trained, so that weight decay pulls
    the factor l towards 1 and not towards 0.
    """

    undecayed: ClassVar[frozenset[str]] = frozenset({"offset"})

    def __init__(self, site: "LinearSite") -> None:
        super().__init__()
        of_input = site.name == RESCALED_INPUT
        self.offset = nn.Parameter(torch.zeros(site.in_features if of_input else site.out_features))
        self.frozen = (site.module,) if of_input else ()  # in a tuple it is no part of this module

    def change(self, x: Tensor, base: Tensor, gate: Tensor) -> Tensor:
        """Give the gated change; see `LinearExpert.change`."""
        if not self.frozen:
            return (gate * self.offset).to(base.dtype) * base  # [B, T, D_out]
        product = frozen_product(self.frozen[0], x * self.offset.to(x.dtype))
        return (gate * product).to(base.dtype)


def frozen_product(module: nn.Module, x: Tensor) -> Tensor:
    """Give ``W x`` of a frozen layer without its bias, past every hook.

    Args:
        module: A linear layer of any kind, quantised ones too.
        x: Float, [B, T, D_in].

    Returns:
        Float, [B, T, D_out].
    """
    module = frozen_layer(module)
    weight = getattr(module, "weight", None)
    if weight is None or weight.is_meta or type(module) not in (nn.Linear, Conv1D):
        output = module.forward(x)  # a quantised or offloaded layer knows where its weight is
        bias = getattr(module, "bias", None)
        return output if bias is None else output - bias.to(output.dtype)
    return F.linear(x, (weight.T if isinstance(module, Conv1D) else weight).to(x.dtype))
