"""The tuner layer: one for each decoder block, with hooks on the block's own modules.

No module of the model is replaced, so every name in the base model stays as it was, quantised layers need no class of
their own, and a disabled adapter leaves the frozen model bit for bit. The gates are made where the block's tokens come
in, wait in the layer until the block's last expert has taken them, and are then gone; a checkpointed block makes them
again in its recomputation.
"""

import contextlib
import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from moa_peft.architecture import Block
from moa_peft.attention import add_prompts, remove_prompts
from moa_peft.block_pass import BlockPass
from moa_peft.config import RouterConfig
from moa_peft.decoding import Add, Attend, Decoding, Read
from moa_peft.errors import RunError, UsageError
from moa_peft.fused import Into
from moa_peft.layer import Mixture, Place, PlacedExpert
from moa_peft.plan import MLP_INPUT, Plan, SiteWork, plan, reads_mlp_output
from moa_peft.products import aligned
from moa_peft.router import Routing
from moa_peft.side_by_side import lay_readers
from moa_peft.tokens import ARGUMENT, CallTokens, TokenWatch

MERGE_REFUSAL = (
    "a mixture cannot be merged into the base weights: its gates depend on the input, token by token. Serve it as an "
    "adapter; unload() takes it off again"
)
CHILD = "moa"
"""The name under which a block holds its tuner layer."""
_NO_GENERATION = object()


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangeRecord:
    """What one expert added at its site in one forward pass, as a change observer sees it."""

    adapter: str
    expert: str
    """The expert's name in the mixture, as in "lora_q_proj"."""
    path: str
    """The module at whose output it was added; for a prompt the attention, before its output projection."""
    gate: Tensor
    """Float32, broadcastable to [B, T, N], detached: one for each of the expert's copies."""
    change: Tensor
    """What was added: [B, T, D_out], the whole of a fused layer's output; [B, T, H, D] at the attention; detached."""
    under: Callable[[Tensor], Tensor]
    """Gives the same change under another gate, such as one copy's alone. Call it only while the observer runs."""


class _Now:
    """Where a block's pass stands. It is no part of the module: to set an attribute of that takes torch a microsecond."""

    __slots__ = (
        "adds", "attend", "block_input", "call", "decoding", "factors", "generation", "passes", "read_mlp",
    )  # fmt: skip

    def __init__(self) -> None:
        self.passes: tuple[BlockPass, ...] = ()  # those that have begun and not ended
        self.call: CallTokens | None = None  # of the pass that has begun, until its tokens are routed
        self.block_input: Tensor | None = None  # likewise
        self.factors: list[Tensor] = []  # of what down_proj is about to read
        self.decoding: Decoding | None = None  # takes the place of the passes where it can: the one used last
        self.generation: object = _NO_GENERATION  # for which that was found
        # What decoding has yet to do in this pass; each is taken by the module that does it.
        self.adds: dict[str, Add] = {}
        self.attend: Attend | None = None
        self.read_mlp: Read | None = None

    def forget(self) -> None:
        """Forget what was found for a generation."""
        self.decoding, self.generation = None, _NO_GENERATION


class MoALayer(nn.Module, BaseTunerLayer):
    """The mixtures of one decoder block, by adapter name.

    Attributes:
        observer: Called with a `GateRecord` for each router of each active adapter in each forward pass, not in
            recomputed or compiled ones; None for nobody. It must not change what it is given.
        change_observer: Called likewise with a `ChangeRecord` for each expert, where it is added.
        watch: Knows the tokens of the model's calls; one for all blocks of a model.
        fused: Whether experts that are bottlenecks are joined (`moa_peft.fused`); False computes each by its own ``change``,
            the definition. A compiled pass always takes the plain path, for the compiler to join, and so does one whose changes
            are observed.
    """

    adapter_layer_names: tuple[str, ...] = ("moa_mixture",)
    fused = True

    def __init__(self, block: Block, watch: TokenWatch) -> None:
        super().__init__()
        self.moa_mixture = nn.ModuleDict({})
        self.block = block
        self.watch = watch
        self.observer: Callable[[GateRecord], None] | None = None
        self.change_observer: Callable[[ChangeRecord], None] | None = None
        self.merged_adapters = []
        self._active_adapter = []
        self._disable_adapters = False
        self._plans: dict[bool, dict[str, Plan]] = {
            False: {},
            True: {},
        }  # by whether they are fused, and adapter
        self._now = _Now()
        self._adding: set[int] = set()  # ids of the hooks that add
        self._handles: list[RemovableHandle] = []
        self._training_handles: list[RemovableHandle] = []

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
        block = self.block
        if any(reads_mlp_output(one) for one in self.mixtures().values()):
            block = replace(block, mlp_output_path=None)  # nothing is added before it is read
        self._plans = {
            fused: {
                adapter: plan(adapter, one, block, fused=fused) for adapter, one in self.mixtures().items()
            }
            for fused in (False, True)
        }
        for one in self._plans[True].values():
            lay_readers(one)
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
        self._hook_pre(self.block.projection_input, self._route)
        attention = self.block.sites.get("attention")
        for path, module in self._sites().items():
            if attention is not None and path == attention.path:
                add_prompts(module, self)
            else:
                joined = any(path in one.work for one in self._plans[True].values())
                add = self._add_at if joined else self._add_unless_fused
                handle = module.register_forward_hook(partial(add, path))
                self._adding.add(handle.id)
                self._handles.append(handle)
        self._connect_inputs()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; see `BaseTunerLayer.enable_adapters`."""
        self._now.forget()
        super().enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the adapters that are on; see `BaseTunerLayer.set_adapter`."""
        self._now.forget()
        super().set_adapter(adapter_names, inference_mode)

    def _connect_inputs(self) -> None:
        """See what the MLP reads."""
        if "mlp" in self._site_names():
            self._hook_pre(self.block.sites["mlp"].module, self._read_mlp)
        self._connect_training()

    def _connect_training(self) -> None:
        """See, while training, what the MLP's last layer reads, and its factors."""
        for handle in self._training_handles:
            handle.remove()
        self._training_handles = []
        if self.training and "down_proj" in self._site_names():
            # These come after the hooks that add, so that what is noted has up_proj's changes.
            for module in self.block.mlp_factors:
                self._training_handles.append(module.register_forward_hook(self._note_factor))
            down = self.block.sites["down_proj"].module
            self._training_handles.append(down.register_forward_pre_hook(self._read_down))

    def _site_names(self) -> set[str]:
        return {place.site.name for one in self.mixtures().values() for place in one.places}

    def train(self, mode: bool = True) -> Self:
        """Switch as torch does, and hook what only training needs."""
        changed = mode != self.training
        super().train(mode)
        self._now.forget()
        if changed:
            self._connect_training()
        return self

    def disconnect(self) -> None:
        """Take every hook off the block's modules."""
        for handle in (*self._handles, *self._training_handles):
            handle.remove()
        self._handles, self._training_handles, self._adding = [], [], set()
        self._now.forget()
        attention = self.block.sites.get("attention")
        if attention is not None:
            remove_prompts(attention.module)

    def attend(self, output: Tensor, query: Tensor, scaling: float) -> Tensor:
        """Add the prompts' changes to the attention's output; see `PromptSource`."""
        attend, self._now.attend = self._now.attend, None
        if attend is not None:
            return attend(output.contiguous(), query, scaling)
        total = output
        for one, site_work in self._take(self.block.sites["attention"].path):
            for work in site_work.single:
                gate = one.mixture.gate_or_one(work.place, one.gate(work.place))
                change = one.mixture.attention_change(work.place, query, scaling, gate)
                total = total + change
                if self.change_observer is not None:
                    under = partial(one.mixture.attention_change, work.place, query, scaling)
                    self._tell_change(one.plan.adapter, work.place, gate, change, under)
            for _, works in site_work.joint:
                for work in works:
                    total = one.attend(total, work, query, scaling)
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
        for parameter in mixture.parameters():  # PEFT may have put a file's weights here, as they lie there
            parameter.data = aligned(parameter.data)
        for one in mixture.side_by_side.values():
            if not one.lies():
                one.lay()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_now": _Now()}  # gates of a pass cut short are of no use to a copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if memo and id(self.block.module) not in memo:
            return self  # one of the block's modules is copied, as for modules_to_save: it keeps its hooks
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def mixtures(self) -> dict[str, Mixture]:
        """The mixtures by adapter name."""
        return dict(self.moa_mixture.items())  # type: ignore[arg-type]  # ModuleDict is untyped

    def _active(self) -> list[str]:
        if self._disable_adapters:
            return []
        active = self._active_adapter
        return [one for one in ([active] if isinstance(active, str) else active) if one in self._plans[True]]

    def _hook_pre(self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))

    def _note_block_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        self._now.block_input = args[0]

    def _send_tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """Put the call's tokens among the block's arguments, which a recomputation replays; a forward pre-hook."""
        if self.watch.current is None and _recomputes():
            raise RunError(
                f"{self.block.path} is recomputed without its arguments, so its router cannot know which tokens are real: "
                "use model.gradient_checkpointing_enable() with transformers 5.23 or newer, or no checkpointing"
            )
        return args, {**kwargs, ARGUMENT: self.watch.current}

    def _receive_tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """Take the call's tokens out of the attention's arguments, to which the block passes them on."""
        if ARGUMENT not in kwargs:
            raise RunError(
                f"{self.block.path} does not pass its keyword arguments on to its attention, so its router cannot know "
                "which tokens are real: this model can have no balance loss and no instance gates"
            )
        self._now.call = kwargs[ARGUMENT]
        return args, {key: value for key, value in kwargs.items() if key != ARGUMENT}

    def _route(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        """Make the gates of the active adapters where q, k and v read their tokens; a forward pre-hook."""
        now, x = self._now, args[0]
        if not is_compiling() and x.shape[1] == 1 and not torch.is_grad_enabled():
            unobserved = self.observer is None and self.change_observer is None
            known = unobserved and now.generation is self.watch.generation
            decoding = now.decoding if known else self._decoding(x)
            if decoding is not None:
                now.passes, now.adds = (), decoding.adds.copy()
                now.attend, now.read_mlp = decoding.attend, decoding.read_mlp
                decoding.route(x)
                return
        now.adds, now.attend, now.read_mlp = {}, None, None
        call, now.call = now.call, None
        block_input, now.block_input = now.block_input, None
        now.factors, now.passes = [], ()
        adapters = self._active()
        if not adapters:
            return
        plans = self._plans_now()
        tell = None if self.observer is None or _unobserved() else self._tell
        now.passes = tuple(
            [
                BlockPass(plans[adapter], call, tell, observed=self.observer is not None)
                for adapter in adapters
            ]
        )
        for one in now.passes:
            one.route(x, block_input)

    def _decoding(self, x: Tensor) -> Decoding | None:
        """What goes on with one token of each row, where a pass before has kept all that it needs.

        It holds for the whole of a generation: each look at all weights costs more than what they compute.
        """
        now, active = self._now, self._active()
        now.forget()
        autocast = torch.is_autocast_enabled(x.device.type)
        observed = self.observer is not None or self.change_observer is not None
        if self.training or not self.fused or autocast or observed or len(active) != 1:
            return None
        plan = self._plans[True][active[0]]
        kept = plan.mixture.kept
        if not plan.is_straight or not kept.begin(plan.mixture, decoding=True):
            return None
        decoding: Decoding | None = kept.find(x.dtype)
        if decoding is None:
            with contextlib.suppress(KeyError):
                decoding = Decoding(plan, x.dtype)
                kept.keep(x.dtype, decoding)
        now.decoding, now.generation = decoding, self.watch.generation or _NO_GENERATION
        return decoding

    def _tell(self, plan: Plan, router: str, routing: Routing) -> None:
        if self.observer is None:
            return
        names = plan.mixture.gate_names if router == "" else map(str, range(routing.gates.shape[-1]))
        self.observer(
            GateRecord(
                adapter=plan.adapter,
                router=router,
                names=tuple(names),
                gates=routing.gates.detach(),
                threshold=None if routing.threshold is None else routing.threshold.detach(),
                balance_loss=routing.balance_loss,
            )
        )

    def _tell_change(
        self, adapter: str, place: Place, gate: Tensor, change: Tensor, under: Callable[[Tensor], Tensor]
    ) -> None:
        if self.change_observer is None or _unobserved():
            return
        self.change_observer(
            ChangeRecord(
                adapter=adapter,
                expert=place.name,
                path=place.site.path,
                gate=gate.detach(),
                change=change.detach(),
                under=under,
            )
        )

    def _take(self, path: str) -> list[tuple[BlockPass, SiteWork]]:
        """The passes that a module is a part of, with what they do to its output; each leaves with its last module."""
        if self._disable_adapters:
            return []
        now = self._now
        taken = [(one, one.plan.work[path]) for one in now.passes if path in one.plan.work]
        for one, _ in taken:
            one.uses -= 1
            if one.uses == 0:
                now.passes = tuple([other for other in now.passes if other.uses])
        if not taken:
            self._refuse_order(path)
        return taken

    def _plans_now(self) -> dict[str, Plan]:
        """The plans of a pass, by adapter."""
        fused = self.fused and self.change_observer is None and not is_compiling()
        return self._plans[fused]

    def _refuse_order(self, path: str) -> None:
        """Raise if an expert's module ran outside of a pass."""
        plans = self._plans_now()
        if any(path in plans[adapter].work for adapter in self._active()):
            raise RunError(
                f"{path} ran before the router of its block: this model does not run its attention first; "
                "name its parts in MoAConfig(architecture=ArchitectureConfig(...))"
            )

    def _read_mlp(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        """Read the MLP's input for the experts beside it; a forward pre-hook."""
        read, self._now.read_mlp = self._now.read_mlp, None
        if read is not None:
            read(args[0])
        for one in self._now.passes:
            one.read(MLP_INPUT, args[0])

    def _read_down(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Read what the MLP's last layer is about to read, while training; a forward pre-hook."""
        x = args[0]
        if not (x.requires_grad and torch.is_grad_enabled()) or is_compiling():
            return None
        if len(self._now.passes) != 1:
            return None  # several would read what the next one passes on
        # The gradient that a linear layer gives its input is a new tensor, which nobody holds unless a hook has seen it.
        alone = len(module._forward_hooks) == len(module._forward_pre_hooks) == 1
        into = Into(self._take_factors(x), in_place=alone and type(module) in (nn.Linear, Conv1D))
        return (self._now.passes[0].read("down_proj", x, into), *args[1:])

    def _note_factor(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG002
        """Note a factor of what down_proj is about to read; a forward hook."""
        if torch.is_grad_enabled() and not is_compiling():
            self._now.factors.append(output)

    def _take_factors(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The factors of what down_proj reads, if it is their product and nothing else, as torch's own graph says."""
        factors, self._now.factors = self._now.factors, []
        node = x.grad_fn
        if len(factors) != 2 or node is None or node.name() != "MulBackward0":
            return None
        one, other = factors
        multiplied = [before for before, _ in node.next_functions]
        is_product = multiplied in ([one.grad_fn, other.grad_fn], [other.grad_fn, one.grad_fn])
        return (one, other) if is_product else None

    def _add_at(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Add the experts' changes to a module's output; a forward hook, and the one place that adds."""
        add = self._now.adds.pop(path, None)
        if add is not None:
            if type(module) is nn.Linear and not output._is_view() and _sees_first(module, self._adding):
                return add(output, args[0])
            return _added(add, module, args[0], output, self._adding)
        taken = self._take(path)
        # Some MLPs give their router's scores as well.
        total = first = output[0] if isinstance(output, tuple) else output
        for one, site_work in taken:
            for work in site_work.single:
                total = total + self._change(one, work.place, args[0], first)
        for one, site_work in taken:  # in place, so only when nobody needs the frozen output any more
            for columns, works in site_work.joint:
                if not writable(total, first, module, self._adding):
                    total = total.clone(memory_format=torch.contiguous_format)
                total = one.add(total, path, columns, works, args[0])
        return (total, *output[1:]) if isinstance(output, tuple) else total

    def _add_unless_fused(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Do what `_add_at` does where it is not done elsewhere, with the changes of another module; a forward hook."""
        return output if self._plans_now() is self._plans[True] else self._add_at(path, module, args, output)

    def _change(self, one: BlockPass, place: Place, x: Tensor, first: Tensor) -> Tensor:
        """The change of one expert by its own definition."""
        gate = one.mixture.gate_or_one(place, one.gate(place, x))
        change = one.mixture.linear_change(place, x, first, gate)
        if self.change_observer is not None:
            under = partial(one.mixture.linear_change, place, x, first)
            self._tell_change(one.plan.adapter, place, gate, change, under)
        return change

    def _sites(self) -> dict[str, nn.Module]:
        """The modules to hook, by path: the experts' own, and the one that an MLP's output comes out of."""
        sites = [place.site for mixture in self.mixtures().values() for place in mixture.places]
        modules = {site.path: site.module for site in sites}
        down = self.block.sites.get("down_proj")
        if down is not None and any(down.path in one.work for one in self._plans[True].values()):
            modules[down.path] = down.module
        return modules


def writable(total: Tensor, first: Tensor, module: nn.Module, adding: Collection[int]) -> bool:
    """Whether a change may be added in place: to a sum of our own, or to what a linear layer has just made.

    Args:
        total: Float, what the change is added to.
        first: Float, what the module gave.
        module: The module.
        adding: Ids of the hooks that add; another that came before may have kept what the module gave.
    """
    if not total.is_contiguous():
        return False
    if total is not first:
        return True
    return type(module) in (nn.Linear, Conv1D) and not total._is_view() and _sees_first(module, adding)


def _sees_first(module: nn.Module, hooks: Collection[int]) -> bool:
    """Whether one of these hooks is the first to see a module's output."""
    return next(iter(module._forward_hooks)) in hooks and not _global_forward_hooks


def _added(add: Add, module: nn.Module, x: Tensor, output: Any, adding: Collection[int]) -> Any:
    """Add changes to a module's output; see `moa_peft.decoding`."""
    if isinstance(output, tuple):
        return (_added(add, module, x, output[0], adding), *output[1:])
    if not writable(output, output, module, adding):
        output = output.clone(memory_format=torch.contiguous_format)
    return add(output, x)


def mixture_layers(model: nn.Module) -> list[tuple[str, MoALayer]]:
    """Find a model's tuner layers, in the order of the blocks.

    Args:
        model: Any model; wrapped by PEFT or loaded by transformers alone.

    Returns:
        Names and layers; empty when the model carries no mixture.
    """
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoALayer)]


def _unobserved() -> bool:
    """Whether the pass is a compiled one, or recomputes one that was observed."""
    return is_compiling() or _recomputes()


def _recomputes() -> bool:
    """Whether a backward pass is under way."""
    return torch._C._current_graph_task_id() != -1


def _reads_block(mixture: Mixture) -> bool:
    return mixture.router is not None and mixture.router.config.router_input == "block"


def needs_tokens(mixture: Mixture) -> bool:
    """Whether a mixture's routing depends on which tokens are real."""
    return any(
        router.has_losses or router.config.granularity == "instance" for router in mixture.routers().values()
    )
