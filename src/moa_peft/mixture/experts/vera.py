"""The VeRA expert: a low-rank change of which only two vectors are trained; its matrices are random and shared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_peft.mixture.config import ExpertConfig
from moa_peft.mixture.experts.base import PROJECTIONS, LinearExpert, register_expert, target_problems

if TYPE_CHECKING:
    from moa_peft.mixture.sites import LinearSite


@register_expert
@dataclass(frozen=True, kw_only=True, slots=True)
class VeraExpert(ExpertConfig):
    """Two trained vectors around frozen random matrices on each of ``targets``, each an expert with a gate of its own."""

    kind: ClassVar[str] = "vera"

    targets: Sequence[str]
    """Projections, by the names they have in Llama: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."""

    rank: int = 256
    """Inner size of the random matrices."""

    initial: float = 0.1
    """What the inner vector d starts at; not 0."""

    seed: int = 0
    """Seed of the random matrices, which are made again from it and never saved."""

    def problems(self) -> list[str]:
        """What is wrong with the fields, a sentence each."""
        wrong = target_problems(self.targets, PROJECTIONS)
        if self.rank < 1:
            wrong.append(f"rank is {self.rank}: it must be at least 1")
        if self.initial == 0:
            wrong.append("initial is 0: neither vector would ever get a gradient; give another number")
        if not 0 <= self.seed < 2**31:
            wrong.append(f"seed is {self.seed}: it must lie in [0, 2 ** 31)")
        return wrong

    def build(self, site: "LinearSite") -> "VectorChange":
        """Make the vectors of one projection."""
        return VectorChange(self, site.in_features, site.out_features)


class VectorChange(LinearExpert):
    """``gate * b * (B (d * (A x)))``: A [r, D_in] and B [D_out, r] frozen, Kaiming-uniform; d constant, b zero at first.

    All sites of one size share one A and one B in memory, on each device and in each dtype.

    Source: VeRA, arXiv 2310.11454. Departure: there, and in PEFT, sites of different sizes have slices of one A and one
    B; here each size has matrices of its own. They come from torch's generator on the CPU, whatever the device.
    """

    undecayed: ClassVar[frozenset[str]] = frozenset({"d", "b"})

    A: Tensor
    B: Tensor

    def __init__(self, config: VeraExpert, in_features: int, out_features: int) -> None:
        super().__init__()
        self.seed = config.seed
        self.d = nn.Parameter(torch.full((config.rank,), float(config.initial)))
        self.b = nn.Parameter(torch.zeros(out_features))
        self.in_features = in_features
        self.register_buffer("A", None, persistent=False)
        self.register_buffer("B", None, persistent=False)
        self._take_matrices()

    def change(self, x: Tensor, base: Tensor, gate: Tensor) -> Tensor:
        """Give ``b * B (gate * d * A x)``; see `LinearExpert.change`."""
        inner = F.linear(x, self.A.to(x.dtype)) * (gate * self.d)  # [B, T, r]
        return F.linear(inner.to(base.dtype), self.B.to(base.dtype)) * self.b.to(base.dtype)

    def _take_matrices(self) -> None:
        """Take the shared matrices of the vectors' device and dtype."""
        rank, out_features = len(self.d), len(self.b)
        self.A = shared_matrix(2 * self.seed, rank, self.in_features, self.b)
        self.B = shared_matrix(2 * self.seed + 1, out_features, rank, self.b)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move or cast the vectors as torch does, and take the matrices of the new device and dtype."""
        self.register_buffer("A", None, persistent=False)
        self.register_buffer("B", None, persistent=False)
        super()._apply(fn, recurse)
        self._take_matrices()
        return self


_MATRICES: "WeakValueDictionary[tuple[object, ...], Tensor]" = WeakValueDictionary()


def shared_matrix(seed: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """Give the random matrix of a seed and a size, made on first use.

    Args:
        seed: Of torch's generator on the CPU.
        rows: Outputs.
        columns: Inputs.
        like: Says the device and the dtype.

    Returns:
        [rows, columns], uniform in ``+-sqrt(6 / columns)``, drawn in float32 and then cast; one tensor for all who ask.
        On the meta device it has no values.
    """
    key = (seed, rows, columns, like.device, like.dtype)
    found = _MATRICES.get(key)
    if found is None:
        with torch.inference_mode(False):  # others train with it
            drawn = torch.empty(rows, columns, device="cpu", dtype=torch.float32)
            nn.init.kaiming_uniform_(drawn, generator=torch.Generator().manual_seed(seed))
            found = drawn.to(device=like.device, dtype=like.dtype)
        _MATRICES[key] = found
    return found
