"""The DoRA expert: a low-rank change of a projection's direction and a learned length of each of its rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moa_peft.errors import UsageError
from moa_peft.mixture.config import ExpertConfig
from moa_peft.mixture.experts.base import PROJECTIONS, LinearExpert, register_expert, target_problems
from moa_peft.mixture.precision import at_least_float32, without_autocast

if TYPE_CHECKING:
    from moa_peft.mixture.sites import LinearSite


@register_expert
@dataclass(frozen=True, kw_only=True, slots=True)
class DoraExpert(ExpertConfig):
    """DoRA on each of ``targets``, each an expert with a gate of its own. It reads the frozen weight in every call."""

    kind: ClassVar[str] = "dora"
    reads_frozen_weights: ClassVar[bool] = True

    targets: Sequence[str]
    """Projections, by the names they have in Llama: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."""

    rank: int = 8
    """Inner size of each low-rank change."""

    alpha: float = 8.0
    """The low-rank change is scaled by alpha / rank, or by alpha / sqrt(rank) with ``rslora``."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank), as rank-stabilized LoRA does (arXiv 2312.03732)."""

    def problems(self) -> list[str]:
        """What is wrong with the fields, a sentence each."""
        wrong = target_problems(self.targets, PROJECTIONS)
        if self.rank < 1:
            wrong.append(f"rank is {self.rank}: it must be at least 1")
        if not self.alpha > 0:
            wrong.append(f"alpha is {self.alpha}: it must be above 0")
        return wrong

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def build(self, site: "LinearSite") -> "WeightDecomposedChange":
        """Make one DoRA.

        Raises:
            UsageError: If the projection's weight cannot be read.
        """
        return WeightDecomposedChange(self, site)


class WeightDecomposedChange(LinearExpert):
    """``gate * ((m / n - 1) W x + (m / n) s B A x)``, n = ``||W + s B A||`` of each row, s = ``config.scale``.

    A [r, D_in] Kaiming-uniform, B [D_out, r] zero, m [D_out] the rows' lengths ``||W||`` at first; no gradient flows
    through n. n takes a pass over the whole frozen weight in each call, and memory for two copies of it in float32.

    Source: DoRA, arXiv 2402.09353, with the constant norm of its section 4.3; with the gate at 1 no departure.
    """

    undecayed: ClassVar[frozenset[str]] = frozenset({"magnitude"})
    lora_b: ClassVar[frozenset[str]] = frozenset({"B"})

    def __init__(self, config: DoraExpert, site: "LinearSite") -> None:
        super().__init__()
        self.scale = config.scale
        self.slot = site.slot
        self.frozen = (site.module,)  # in a tuple it is no part of this module
        self.A = nn.Parameter(torch.empty(config.rank, site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, config.rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.magnitude = nn.Parameter(self._first_magnitude(site))

    def change(self, x: Tensor, base: Tensor, gate: Tensor) -> Tensor:
        """Give the gated change; see `LinearExpert.change`."""
        # The norm is rounded as the magnitude is, so that their ratio is exactly 1 at first, whatever their dtype.
        norm = at_least_float32(self._norm().to(self.magnitude.dtype)).clamp(min=1e-12)
        ratio = at_least_float32(self.magnitude) / norm  # [D_out]
        inner = F.linear(x, self.A.to(x.dtype)) * (self.scale * gate)  # [B, T, r]
        turned = F.linear(inner.to(base.dtype), (ratio.unsqueeze(-1) * self.B).to(base.dtype))
        return turned + (gate * (ratio - 1)).to(base.dtype) * self._without_bias(base)

    def _first_magnitude(self, site: "LinearSite") -> Tensor:
        """The lengths of the frozen rows; without values to read (meta device), what only loading can fill."""
        with gather_params_ctx(site.module.parameters()):  # ZeRO-3 has taken the model apart as it was loaded
            if self.A.is_meta or self._rows().is_meta:
                return torch.full((site.out_features,), math.nan)
            return self._norm().to(dtype=self.A.dtype)

    def _norm(self) -> Tensor:
        """Measure each row of ``W + s B A``: [D_out], at least float32, without gradient."""
        with torch.no_grad(), without_autocast(self.B.device):
            rows = at_least_float32(self._rows())
            down, up = (one.to(device=rows.device, dtype=rows.dtype) for one in (self.A, self.B))
            return torch.addmm(rows, up, down, alpha=self.scale).norm(dim=1)

    def _rows(self) -> Tensor:
        """The frozen weight of this projection: [D_out, D_in]."""
        module = self.frozen[0]
        weight: Tensor = dequantised(module) if is_packed(module) else module.weight  # type: ignore[assignment]  # typed as Tensor | Module
        columns = weight if isinstance(module, Conv1D) else weight.T  # [D_in, outputs of the module]
        return (columns if self.slot is None else self.slot.take(columns)).T

    def _without_bias(self, base: Tensor) -> Tensor:
        bias = getattr(self.frozen[0], "bias", None)
        if bias is None:
            return base
        return base - (bias if self.slot is None else self.slot.take(bias)).to(base.dtype)


READABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_packed(module: nn.Module) -> bool:
    """Say whether a frozen layer's weight has to be dequantised before it can be read.

    Raises:
        UsageError: If it cannot be read at all.
    """
    weight = getattr(module, "weight", None)
    # FSDP1 puts plain tensors in the place of parameters
    if isinstance(weight, Tensor) and type(weight) in (nn.Parameter, Tensor) and weight.dtype in READABLE:
        return False
    try:
        dtype = dequantised(module).dtype
        reason = f"its numbers are {dtype}, without their scale"
    except (AttributeError, TypeError) as error:
        dtype, reason = None, str(error)
    if dtype in READABLE:
        return True
    raise UsageError(
        f"expert 'dora' cannot read the weight of {type(module).__name__}: {reason}; use lora on such a base, or load it "
        "unquantised or with bitsandbytes, torchao or HQQ"
    )


def dequantised(module: nn.Module) -> Tensor:
    """Dequantise a frozen layer's weight and leave the layer as it is.

    On a CPU PEFT puts a copy there, and that of a bitsandbytes layer with 8 bits has no scale once the layer has run.
    """
    weight = getattr(module, "weight", None)
    values = dequantize_module_weight(module)
    if weight is not None:
        module.weight = weight
    return values
