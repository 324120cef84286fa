"""The tuner layer: one for each decoder block, with hooks on the block's own modules.

No module of the model is replaced, so every name in the base model stays as it was, quantised layers need no class of
their own, and a disabled adapter leaves the frozen model bit for bit. The gates are made where the block's tokens come
in, wait in the layer until the block's last expert has taken them, and are then gone; a checkpointed block makes them
again in its recomputation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from moa_peft.router import Router, Routing
from moa_peft.tokens import ARGUMENT, CallTokens, TokenWatch

MERGE_REFUSAL = (
    "a mixture cannot be merged into the base weights: its gates depend on the input, token by token. Serve it as an "
    "adapter; unload() takes it off again"
)
CHILD = "moa"
"""The name under which a block holds its tuner layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRecord:
    """What one router said in one forward pass of one block, as an observer sees it."""

    adapter: str
    router: str
    """The block's router is "", that of an expert's copies has the expert's name."""
    names: tuple[str, ...]
    """What is gated, in the order of the gates: experts, kinds of experts, or copies of one expert."""
    gates: Tensor
    """Float32, [B, T, E], detached; [B, 1, E] where a whole instance has the same."""
    threshold: Tensor | None
    """Float32, broadcastable to [B, T, 1], detached; None where the gate has none."""
    balance_loss: Tensor | None = None
    """Float32, a scalar, before its coefficient, detached; None where there is none."""


@dataclass(kw_only=True, slots=True)
class _Routed:
    """What one adapter's routers said where a block's tokens came in; it waits until the block's last expert took it."""

    adapter: str
    mixture: Mixture
    call: CallTokens
    gates: Tensor | None = None
    """Float32, [B, T, C], the block's; None without a block router."""
    copies: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the copies of experts at the attention, which see no tokens themselves, by name."""
    uses: int = 0
    """Sites that have yet to take it."""


class MoALayer(nn.Module, BaseTunerLayer):
    """The mixtures of one decoder block, by adapter name.

    Attributes:
        observer: Called with a `GateRecord` for each router of each active adapter in each forward pass, not in
            recomputed or compiled ones; None for nobody. It must not change what it is given.
        watch: Knows the tokens of the model's calls; one for all blocks of a model.
    """

    adapter_layer_names: tuple[str, ...] = ("moa_mixture",)

    def __init__(self, block: Block, watch: TokenWatch) -> None:
        super().__init__()
        self.moa_mixture = nn.ModuleDict({})
        self.block = block
        self.watch = watch
        self.observer: Callable[[GateRecord], None] | None = None
        self.merged_adapters = []
        self._active_adapter = []
        self._disable_adapters = False
        self._waiting: dict[str, _Routed] = {}  # by adapter
        self._call: CallTokens | None = None  # of the pass that has begun, until its tokens are routed
        self._block_input: Tensor | None = None  # likewise
        self._handles: list[RemovableHandle] = []

    def add_mixture(self, adapter: str, experts: list[PlacedExpert], router: RouterConfig | None) -> None:
        """Make the mixture of one adapter and put it to work.

        Args:
            adapter: The adapter's name.
            experts: The experts of this block with their sites, in the order of their gates.
            router: Their router; None where every gate is 1.
        """
        self.moa_mixture[adapter] = Mixture(self.block.hidden_size, experts, router)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.connect()

    def connect(self) -> None:
        """Hook every site that has an expert."""
        self.disconnect()
        routed = [mixture for mixture in self.mixtures().values() if mixture.routers()]
        if any(_reads_block(mixture) for mixture in routed) and self.block.block_input is not None:
            self._hook_pre(self.block.block_input, self._note_block_input)
        if any(needs_tokens(mixture) for mixture in routed):
            if self.block.attention is None:
                raise UsageError(
                    f"{self.block.path} has no known attention: name it in ArchitectureConfig(attention=...)"
                )
            self._hook_pre(self.block.module, self._send_tokens, with_kwargs=True)
            self._hook_pre(self.block.attention, self._receive_tokens, with_kwargs=True)
        if routed:
            self._hook_pre(self.block.projection_input, self._route)
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
        for routed, place in self._at(self.block.sites["attention"].path):
            gate = routed.mixture.gates_of(place, routed.gates, routed.copies.get(place.name))
            change = routed.mixture.attention_change(place, query, scaling, gate)
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
            for router in mixture.routers().values():
                for parameter in router.untrained():
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
        return {
            **self.__dict__,
            "_waiting": {},
            "_call": None,
            "_block_input": None,
        }  # gates of a pass cut short are of no use to a copy

    def mixtures(self) -> dict[str, Mixture]:
        """The mixtures by adapter name."""
        return dict(self.moa_mixture.items())  # type: ignore[arg-type]  # ModuleDict is untyped

    def _active(self) -> list[str]:
        if self._disable_adapters:
            return []
        return [adapter for adapter in self.active_adapters if adapter in self.moa_mixture]

    def _hook_pre(self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))

    def _note_block_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        self._block_input = args[0]

    def _send_tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """Put the call's tokens among the block's arguments, which a recomputation replays; a forward pre-hook."""
        return args, {**kwargs, ARGUMENT: self.watch.current}

    def _receive_tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """Take the call's tokens out of the attention's arguments, to which the block passes them on."""
        if ARGUMENT not in kwargs:
            raise RunError(
                f"{self.block.path} does not pass its keyword arguments on to its attention, so its router cannot know "
                "which tokens are real: this model can have no balance loss and no instance gates"
            )
        self._call = kwargs[ARGUMENT]
        return args, {key: value for key, value in kwargs.items() if key != ARGUMENT}

    def _route(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        """Make the gates of the active adapters where q, k and v read their tokens; a forward pre-hook."""
        call, self._call = self._call or CallTokens(), None
        block_input, self._block_input = self._block_input, None
        for adapter in self._active():
            mixture: Mixture = self.moa_mixture[adapter]  # type: ignore[assignment]  # ModuleDict is untyped
            if not mixture.routers():
                continue
            routed = _Routed(adapter=adapter, mixture=mixture, call=call, uses=len(mixture.by_path))
            if mixture.router is not None:
                x = block_input if _reads_block(mixture) else args[0]
                assert x is not None, "a block's input is noted before its projections run"
                routed.gates = self._block_gates(adapter, mixture, mixture.router, x, call)
            for place in mixture.places:
                weights = self._copy_weights(routed, place, args[0]) if _at_attention(place) else None
                if weights is not None:
                    routed.copies[place.name] = weights
            self._waiting[adapter] = routed

    def _block_gates(
        self, adapter: str, mixture: Mixture, router: Router, x: Tensor, call: CallTokens
    ) -> Tensor:
        """The gates of a block's experts, [B, T, C] or [B, 1, C]."""
        if router.config.granularity == "token":
            routing = router(x, call.real)
        else:
            official = router.config.pooling == "official"
            key = f"{self.block.path}.{adapter}"
            if call.earlier is not None and key in call.earlier:
                return call.earlier[key].to(x.device)
            routing = router(call.mean(x, everything=official), None if official else call.starts())
            if call.paged is not None:
                routing = replace(routing, gates=call.paged.keep(key, routing.gates))
            elif not official:
                call.found[key] = routing.gates.detach()
        self._tell(adapter, "", tuple(mixture.gate_names), routing)
        return routing.gates

    def _copy_weights(self, routed: _Routed, place: Place, x: Tensor) -> Tensor | None:
        """The weights of the copies of one expert, [B, T, N]; None where it is alone."""
        routing = routed.mixture.route_copies(place, x, routed.call.real)
        if routing is None:
            return None
        names = tuple(str(number) for number in range(routing.gates.shape[-1]))
        self._tell(routed.adapter, place.name, names, routing)
        return routing.gates

    def _tell(self, adapter: str, router: str, names: tuple[str, ...], routing: Routing) -> None:
        if self.observer is None or torch.compiler.is_compiling():
            return
        recomputing = torch._C._current_graph_task_id() != -1
        if recomputing:
            return
        self.observer(
            GateRecord(
                adapter=adapter,
                router=router,
                names=names,
                gates=routing.gates.detach(),
                threshold=None if routing.threshold is None else routing.threshold.detach(),
                balance_loss=routing.balance_loss,
            )
        )

    def _at(self, path: str) -> list[tuple[_Routed, Place]]:
        """The active experts at a site with what was routed for them, which leaves with the block's last site."""
        found: list[tuple[_Routed, Place]] = []
        for adapter in self._active():
            mixture: Mixture = self.moa_mixture[adapter]  # type: ignore[assignment]  # ModuleDict is untyped
            if path not in mixture.by_path:
                continue
            unrouted = not mixture.routers()
            routed = (
                _Routed(adapter=adapter, mixture=mixture, call=CallTokens())
                if unrouted
                else self._take(adapter, path)
            )
            found += [(routed, place) for place in mixture.by_path[path]]
        return found

    def _take(self, adapter: str, path: str) -> _Routed:
        if adapter not in self._waiting:
            raise RunError(
                f"{path} ran before the router of its block: this model does not run its attention first; "
                "name its parts in MoAConfig(architecture=ArchitectureConfig(...))"
            )
        routed = self._waiting[adapter]
        routed.uses -= 1
        if routed.uses == 0:
            del self._waiting[adapter]
        return routed

    def _add_at(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ARG002
        """Add the experts' changes to a module's output; a forward hook, and the one place that adds."""
        first = (
            output[0] if isinstance(output, tuple) else output
        )  # some MLPs give their router's scores as well
        total = first
        for routed, place in self._at(path):
            copies = self._copy_weights(routed, place, args[0])
            gate = routed.mixture.gates_of(place, routed.gates, copies)
            total = total + routed.mixture.linear_change(place, args[0], first, gate)
        return (total, *output[1:]) if isinstance(output, tuple) else total

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


def _reads_block(mixture: Mixture) -> bool:
    return mixture.router is not None and mixture.router.config.router_input == "block"


def _at_attention(place: Place) -> bool:
    return isinstance(place.site, AttentionSite)


def needs_tokens(mixture: Mixture) -> bool:
    """Whether a mixture's routing depends on which tokens are real."""
    return any(
        router.has_losses or router.config.granularity == "instance" for router in mixture.routers().values()
    )
