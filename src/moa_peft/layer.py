"""The mixture of one decoder block: its experts, its router, and the arithmetic that joins them.

Sizes: B rows, T tokens of a row, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from moa_peft.architecture import AttentionSite, LinearSite
from moa_peft.config import ExpertConfig, RouterConfig
from moa_peft.router import Router

if TYPE_CHECKING:
    from moa_peft.experts.base import AttentionExpert, LinearExpert


PlacedExpert = tuple[ExpertConfig, LinearSite | AttentionSite]
"""An expert to be made and the site it will work at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one expert of a mixture works, and which gate is its own."""

    name: str
    """The expert's name in the mixture, as in "lora_q_proj"."""
    column: int
    """Its column of the gates."""
    site: LinearSite | AttentionSite


class Mixture(nn.Module):
    """All experts of one block and one adapter, with their router. It holds weights and knows no model.

    Attributes:
        places: The experts in the order of their gates.
        by_path: The same by the path of the module they work at.
    """

    def __init__(self, hidden_size: int, experts: Sequence[PlacedExpert], router: RouterConfig) -> None:
        super().__init__()
        self.places: list[Place] = []
        self.experts = nn.ModuleDict()
        for config, site in experts:
            name = self._free_name(config.kind, site.name)
            self.places.append(Place(name=name, column=len(self.places), site=site))
            self.experts[name] = config.build(site)
        self.by_path: dict[str, list[Place]] = {}
        for place in self.places:
            self.by_path.setdefault(place.site.path, []).append(place)
        self.router = Router(hidden_size, len(self.places), router)

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names in the order of their gates."""
        return tuple(place.name for place in self.places)

    @property
    def starts_at_zero(self) -> bool:
        """Whether a fresh mixture leaves the model bit-equal to the frozen one."""
        return all(expert.starts_at_zero for expert in self.experts.values())

    def linear_changes(self, places: Sequence[Place], x: Tensor, output: Tensor, gates: Tensor) -> Tensor:
        """Add up the gated changes of the experts at one linear layer or MLP.

        Args:
            places: This mixture's experts there.
            x: Float, [B, T, D_in], the layer's input.
            output: Float, [B, T, D_out], the frozen layer's output, a fused layer's whole.
            gates: Float32, [B, T, E].

        Returns:
            [B, T, D_out] in the dtype of ``output``.
        """
        total: Tensor | None = None
        for place in places:
            expert: LinearExpert = self.experts[place.name]  # type: ignore[assignment]  # ModuleDict is untyped
            slot = place.site.slot if isinstance(place.site, LinearSite) else None
            base = output if slot is None else slot.take(output)
            change = expert.change(x, base, gates[..., place.column : place.column + 1])
            change = change if slot is None else slot.place(change)
            total = change if total is None else total + change
        assert total is not None, "called for a site that has no expert"
        return total

    def attention_changes(
        self, places: Sequence[Place], query: Tensor, scaling: float, gates: Tensor
    ) -> Tensor:
        """Add up the gated changes of the experts at the attention.

        Args:
            places: This mixture's experts there.
            query: Float, [B, H, T, D], after rotary embedding.
            scaling: Factor of the attention scores.
            gates: Float32, [B, T, E].

        Returns:
            [B, T, H, D] in the dtype of ``query``.
        """
        total: Tensor | None = None
        for place in places:
            expert: AttentionExpert = self.experts[place.name]  # type: ignore[assignment]  # ModuleDict is untyped
            assert isinstance(place.site, AttentionSite)
            change = expert.change(place.site, query, scaling, gates[..., place.column : place.column + 1])
            total = change if total is None else total + change
        assert total is not None, "called for a site that has no expert"
        return total

    def _free_name(self, kind: str, site_name: str) -> str:
        name = kind if site_name in ("mlp", "attention") else f"{kind}_{site_name}"
        taken = sum(place.name.split("__")[0] == name for place in self.places)
        return f"{name}__{taken + 1}" if taken else name
