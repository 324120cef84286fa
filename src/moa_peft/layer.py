"""The mixture of one decoder block: its experts, its routers, and the arithmetic that joins them.

Sizes: B rows, T tokens of a row, C gates of a block, N copies of an expert at its site.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from moa_peft.architecture import AttentionSite, LinearSite
from moa_peft.config import ExpertConfig, RouterConfig
from moa_peft.kept_weights import KeptWeights
from moa_peft.router import Router

if TYPE_CHECKING:
    from moa_peft.experts.base import AttentionExpert, LinearExpert
    from moa_peft.side_by_side import SideBySide

PlacedExpert = tuple[ExpertConfig, LinearSite | AttentionSite]
"""An expert to be made and the site it will work at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one expert of a mixture works, and which gate is its own."""

    name: str
    """The expert's name in the mixture, as in "lora_q_proj"."""
    column: int
    """Its column of the block's gates."""
    site: LinearSite | AttentionSite


class Mixture(nn.Module):
    """All experts of one block and one adapter, with their routers. It holds weights and knows no model.

    Attributes:
        places: The experts in the order they were given.
        gate_names: What the block's gates are called, in their order: experts, or kinds of experts.
        router: The block's router; None where every gate is 1.
        copy_routers: Routers of the experts that have several copies at their site, by the expert's name.
        kept: Stacked weights, keys and values for decoding.
        side_by_side: By the name of an input: the weights of everything that reads it on the fused path.
    """

    def __init__(
        self, hidden_size: int, experts: Sequence[PlacedExpert], router: RouterConfig | None
    ) -> None:
        super().__init__()
        self.places: list[Place] = []
        self.gate_names: list[str] = []
        self.experts = nn.ModuleDict()
        self.copy_routers = nn.ModuleDict()
        for config, site in experts:
            name = self._free_name(config.kind, site.name)
            column = self._column(name, config.kind, router)
            self.places.append(Place(name=name, column=column, site=site))
            self.experts[name] = config.build(site)
            copies, copy_router = config.copies()
            if copy_router is not None:
                inputs = site.in_features if isinstance(site, LinearSite) else site.hidden_size
                self.copy_routers[name] = Router(inputs, copies, copy_router)
        if router is not None and router.dead_adapter_gate:
            self._share_prompt_gate()
        self.router = None if router is None else Router(hidden_size, len(self.gate_names), router)
        self.kept = KeptWeights()
        self.side_by_side: dict[str, SideBySide] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names in the order they were given."""
        return tuple(place.name for place in self.places)

    @property
    def starts_at_zero(self) -> bool:
        """Whether a fresh mixture leaves the model bit-equal to the frozen one."""
        return all(expert.starts_at_zero for expert in self.experts.values())

    def routers(self) -> dict[str, Router]:
        """Every router by name: the block's as "", those of copies by their expert's name."""
        block = {} if self.router is None else {"": self.router}
        return {**block, **dict(self.copy_routers.items())}  # type: ignore[dict-item]  # ModuleDict is untyped

    def copy_router(self, place: Place) -> Router:
        """The router of the copies of an expert that has several."""
        return self.copy_routers[place.name]  # type: ignore[return-value]  # ModuleDict is untyped

    def gate_or_one(self, place: Place, gate: Tensor | None) -> Tensor:
        """Give an expert's gate, or a 1 [1, 1, 1] in float32 where it has none."""
        if gate is not None:
            return gate
        device = next(self.experts[place.name].parameters()).device
        return torch.ones((1, 1, 1), dtype=torch.float32, device=device)

    def linear_change(self, place: Place, x: Tensor, output: Tensor, gate: Tensor) -> Tensor:
        """Give the gated change of one expert at a linear layer or MLP.

        Args:
            place: One of this mixture's experts there.
            x: Float, [B, T, D_in], the layer's input.
            output: Float, [B, T, D_out], the frozen layer's output, a fused layer's whole.
            gate: Float32, broadcastable to [B, T, N].

        Returns:
            [B, T, D_out] in the dtype of ``output``.
        """
        expert: LinearExpert = self.experts[place.name]  # type: ignore[assignment]  # ModuleDict is untyped
        slot = place.site.slot if isinstance(place.site, LinearSite) else None
        if slot is None:
            return expert.change(x, output, gate)
        return slot.place(expert.change(x, slot.take(output), gate))

    def attention_change(self, place: Place, query: Tensor, scaling: float, gate: Tensor) -> Tensor:
        """Give the gated change of one expert at the attention.

        Args:
            place: One of this mixture's experts there.
            query: Float, [B, H, T, D], after rotary embedding.
            scaling: Factor of the attention scores.
            gate: Float32, broadcastable to [B, T, N].

        Returns:
            [B, T, H, D] in the dtype of ``query``.
        """
        expert: AttentionExpert = self.experts[place.name]  # type: ignore[assignment]  # ModuleDict is untyped
        assert isinstance(place.site, AttentionSite)
        return expert.change(place.site, query, scaling, gate)

    def train(self, mode: bool = True) -> Self:
        """Switch as torch does, and forget what was kept for decoding."""
        self.kept.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or cast as torch does, each weight to a place of its own; forget what was kept, and lay what lay side by side."""
        self.kept.clear()
        laid = [one for one in self.side_by_side.values() if one.lies()]
        super()._apply(fn, recurse)
        for one in laid:
            one.follow()
        return self

    def _column(self, name: str, kind: str, router: RouterConfig | None) -> int:
        gate_name = kind if router is not None and router.gate_of == "kind" else name
        if gate_name not in self.gate_names:
            self.gate_names.append(gate_name)
        return self.gate_names.index(gate_name)

    def _share_prompt_gate(self) -> None:
        """Give the parallel adapter the prompt's gate, where both are there; its own column is then dead."""
        if "prompt" not in self.gate_names:
            return
        column = self.gate_names.index("prompt")
        self.places = [
            replace(one, column=column) if one.name == "parallel_adapter" else one for one in self.places
        ]

    def _free_name(self, kind: str, site_name: str) -> str:
        name = kind if site_name in ("mlp", "attention") else f"{kind}_{site_name}"
        taken = sum(place.name.split("__")[0] == name for place in self.places)
        return f"{name}__{taken + 1}" if taken else name
