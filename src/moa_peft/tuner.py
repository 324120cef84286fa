"""The tuner layer: one for each decoder block, with hooks on the block's own modules.

No module of the model is replaced, so every name in the base model stays as it was, quantised layers need no class of
their own, and a disabled adapter leaves the frozen model bit for bit. The gates are made where the block's tokens come
in, wait in the layer until the block's last expert has taken them, and are then gone; a checkpointed block makes them
again in its recomputation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moa_peft.architecture import AttentionSite, Block, LinearSite
from moa_peft.attention import add_prompts, remove_prompts
from moa_peft.config import RouterConfig
from moa_peft.errors import RunError, UsageError
from moa_peft.layer import Mixture, Place, PlacedExpert

MERGE_REFUSAL = (
    "a mixture cannot be merged into the base weights: its gates depend on the input, token by token. Serve it as an "
    "adapter; unload() takes it off again"
)
CHILD = "moa"
"""The name under which a block holds its tuner layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRecord:
    """The gates of one forward pass of one block, as an observer sees them."""

    adapter: str
    names: tuple[str, ...]
    """The experts, in the order of the gates."""
    gates: Tensor
    """Float32, [B, T, E], detached."""
    threshold: Tensor | None
    """Float32, broadcastable to [B, T, 1], detached; None for Soft MoA."""


class MoALayer(nn.Module, BaseTunerLayer):
    """The mixtures of one decoder block, by adapter name.

    Attributes:
        observer: Called with a `GateRecord` for each active adapter in each forward pass, not in recomputed or
            compiled ones; None for nobody. It must not change what it is given.
    """

    adapter_layer_names: tuple[str, ...] = ("moa_mixture",)

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.moa_mixture = nn.ModuleDict({})
        self.block = block
        self.observer: Callable[[GateRecord], None] | None = None
        self.merged_adapters = []
        self._active_adapter = []
        self._disable_adapters = False
        self._waiting: dict[
            str, list[Any]
        ] = {}  # by adapter: the gates, and how many sites have yet to take them
        self._handles: list[RemovableHandle] = []

    def add_mixture(self, adapter: str, experts: list[PlacedExpert], router: RouterConfig) -> None:
        """Make the mixture of one adapter and put it to work.

        Args:
            adapter: The adapter's name.
            experts: The experts of this block with their sites, in the order of their gates.
            router: Their router.
        """
        self.moa_mixture[adapter] = Mixture(self.block.hidden_size, experts, router)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.connect()

    def connect(self) -> None:
        """Hook every site that has an expert."""
        self.disconnect()
        self._hook_pre(self.block.projection_input, "projection")
        if self.block.block_input is not None:
            self._hook_pre(self.block.block_input, "block")
        for site in self._sites().values():
            if isinstance(site, AttentionSite):
                add_prompts(site.module, self)
            else:
                hook = partial(self._add_at, site.path)
                self._handles.append(site.module.register_forward_hook(hook))

    def disconnect(self) -> None:
        """Take every hook off the block's modules."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        attention = self.block.sites.get("attention")
        if attention is not None:
            remove_prompts(attention.module)

    def attention_change(self, query: Tensor, scaling: float) -> Tensor | None:
        """Give the prompts' change of the attention's output [B, T, H, D]; None where there is none."""
        total: Tensor | None = None
        for mixture, places, gates in self._at(self.block.sites["attention"].path):
            change = mixture.attention_changes(places, query, scaling, gates)
            total = change if total is None else total + change
        return total

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete one adapter's mixture; see `BaseTunerLayer.delete_adapter`."""
        super().delete_adapter(adapter_name)
        self.connect()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002  # PEFT's
        """Refuse: see `MoAModel`."""
        raise UsageError(MERGE_REFUSAL)

    def get_base_layer(self) -> nn.Module:
        """The layer whose device and dtype the experts take: the one that q, k and v come out of."""
        return self.block.projection_input

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:  # noqa: ARG002  # PEFT's name
        for mixture in self.mixtures().values():
            for parameter in mixture.router.untrained():
                parameter.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move one adapter to the block's device. Its dtype stays: `MoAModel` decides on that."""
        base_device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        mixture = self.mixtures().get(adapter_name)
        device = device or base_device
        if mixture is None or device is None or any(p.device.type == "meta" for p in mixture.parameters()):
            return
        mixture.to(device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_waiting": {}}  # gates of a pass cut short are of no use to a copy

    def mixtures(self) -> dict[str, Mixture]:
        """The mixtures by adapter name."""
        return dict(self.moa_mixture.items())  # type: ignore[arg-type]  # ModuleDict is untyped

    def _active(self) -> list[str]:
        if self._disable_adapters:
            return []
        return [adapter for adapter in self.active_adapters if adapter in self.moa_mixture]

    def _hook_pre(self, module: nn.Module, router_input: str) -> None:
        readers = [m for m in self.mixtures().values() if m.router.config.router_input == router_input]
        if readers:
            self._handles.append(module.register_forward_pre_hook(partial(self._route, router_input)))

    def _route(self, router_input: str, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        """Make the gates of the adapters that read this module's input; a forward pre-hook."""
        for adapter in self._active():
            mixture: Mixture = self.moa_mixture[adapter]  # type: ignore[assignment]  # ModuleDict is untyped
            if mixture.router.config.router_input != router_input:
                continue
            gates, threshold = mixture.router(args[0])
            self._waiting[adapter] = [gates, len(mixture.by_path)]
            if self.observer is not None:
                self._tell(self.observer, adapter, mixture, gates, threshold)

    def _tell(
        self,
        observer: Callable[[GateRecord], None],
        adapter: str,
        mixture: Mixture,
        gates: Tensor,
        threshold: Tensor | None,
    ) -> None:
        recomputing = torch._C._current_graph_task_id() != -1
        if recomputing or torch.compiler.is_compiling():
            return
        fixed = None if threshold is None else threshold.detach()
        observer(GateRecord(adapter=adapter, names=mixture.names, gates=gates.detach(), threshold=fixed))

    def _at(self, path: str) -> list[tuple[Mixture, list[Place], Tensor]]:
        """The active mixtures with experts at a site, and their gates, which leave with the last site."""
        found: list[tuple[Mixture, list[Place], Tensor]] = []
        for adapter in self._active():
            mixture: Mixture = self.moa_mixture[adapter]  # type: ignore[assignment]  # ModuleDict is untyped
            if path not in mixture.by_path:
                continue
            if adapter not in self._waiting:
                raise RunError(
                    f"{path} ran before the router of its block: this model does not run its attention first; "
                    "name its parts in MoAConfig(architecture=ArchitectureConfig(...))"
                )
            gates, uses = self._waiting[adapter]
            if uses == 1:
                del self._waiting[adapter]
            else:
                self._waiting[adapter] = [gates, uses - 1]
            found.append((mixture, mixture.by_path[path], gates))
        return found

    def _add_at(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ARG002
        """Add the experts' changes to a module's output; a forward hook, and the one place that adds."""
        first = (
            output[0] if isinstance(output, tuple) else output
        )  # some MLPs give their router's scores as well
        for mixture, places, gates in self._at(path):
            first = first + mixture.linear_changes(places, args[0], first, gates)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def _sites(self) -> dict[str, LinearSite | AttentionSite]:
        """The sites of all mixtures, one for each module."""
        return {
            place.site.path: place.site for mixture in self.mixtures().values() for place in mixture.places
        }


def mixture_layers(model: nn.Module) -> list[tuple[str, MoALayer]]:
    """Find a model's tuner layers, in the order of the blocks.

    Args:
        model: Any model; wrapped by PEFT or loaded by transformers alone.

    Returns:
        Names and layers; empty when the model carries no mixture.
    """
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoALayer)]
