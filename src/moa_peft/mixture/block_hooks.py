"""The layer of a decoder block: the mixtures of its adapters, and hooks on the block's own modules.

No module of the model is replaced, so every name in the base model stays as it was, quantised layers need no class of
their own, and a disabled adapter leaves the frozen model bit for bit. The gates are made where the block's tokens come
in, wait in the layer until the block's last expert has taken them, and are then gone; a checkpointed block makes them
again in its recomputation.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from moa_peft.errors import RunError, UsageError
from moa_peft.mixture.config import RouterConfig
from moa_peft.mixture.mixture import Mixture, MixturePass, PlacedExpert
from moa_peft.mixture.prompt_attention import add_prompts, remove_prompts
from moa_peft.mixture.router import Routing
from moa_peft.mixture.sites import Block
from moa_peft.mixture.token_masks import CallTokens
from moa_peft.mixture.token_watch import ARGUMENT, TokenWatch

MERGE_REFUSAL = (
    "a mixture cannot be merged into the base weights: its gates depend on the input, token by token. Serve it as an "
    "adapter; unload() takes it off again"
)
CHILD = "moa"
"""The name under which a block holds its layer."""


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


class _State(threading.local):
    """How far a block's forward pass has come in a thread. It is no part of the module and of no copy of it."""

    def __init__(self) -> None:
        self.in_call = False  # the block is called, not recomputed
        self.routed = False
        self.call: CallTokens | None = None  # until its tokens are routed
        self.block_input: Tensor | None = None  # likewise
        self.passes: tuple[MixturePass, ...] = ()
        self.modules_left = 0  # that have experts and have not run
        self.tokens = (0, 0)  # rows and tokens of a row

    def end(self) -> None:
        """Forget the pass."""
        self.in_call, self.routed, self.call, self.block_input, self.passes = False, False, None, None, ()

    def __reduce__(self) -> tuple[type, tuple[()]]:  # gates of a pass cut short are of no use to a copy
        return _State, ()


class MoALayer(nn.Module, BaseTunerLayer):
    """The mixtures of one decoder block, by adapter name.

    Attributes:
        observer: Called with a `GateRecord` for each router of each active adapter in each forward pass, not in
            recomputed or compiled ones; None for no observer. It must not change what it is given. A block that is
            recomputed as a whole, hooks included, as by torch's own checkpoint wrapper, calls it again.
        change_observer: Called likewise with a `ChangeRecord` for each expert, where it is added.
        watch: Knows the tokens of the model's calls; one for all blocks of a model.
    """

    adapter_layer_names: tuple[str, ...] = ("moa_mixture",)

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
        self.cast_input_dtype_enabled = True  # PEFT's helper switches it; nothing is cast by it
        self._needs_tokens = False
        self._handles: list[RemovableHandle] = []
        self._state = _State()

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
        """Hook every module that has an expert, and those that routers read."""
        self.disconnect()
        block, mixtures = self.block, self.mixtures().values()
        routed = [mixture for mixture in mixtures if mixture.routers()]
        self._hook_pre(block.module, self._begin, with_kwargs=True)
        self._handles.append(block.module.register_forward_hook(self._end, always_call=True))
        if any(_reads_block(mixture) for mixture in routed) and block.block_input is not None:
            self._hook_pre(block.block_input, self._note_block_input)
        self._needs_tokens = any(mixture.needs_tokens for mixture in routed)
        if self._needs_tokens:
            assert block.attention is not None, "check_tokens has refused such blocks"
            self._hook_pre(block.attention, self._receive_tokens, with_kwargs=True)
        self._hook_pre(block.projection_input, self._route)
        for path, site in {place.site.path: place.site for one in mixtures for place in one.places}.items():
            if site.name == "attention":
                add_prompts(site.module, self.attend)
            else:
                self._handles.append(site.module.register_forward_hook(partial(self._add, path)))

    def disconnect(self) -> None:
        """Take every hook off the block's modules."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._state.end()
        attention = self.block.sites.get("attention")
        if attention is not None:
            remove_prompts(attention.module)

    def attend(self, output: Tensor, query: Tensor, scaling: float) -> Tensor:
        """Add the prompts' changes to the attention's output; see `moa_peft.mixture.prompt_attention.add_prompts`."""
        path = self.block.sites["attention"].path
        for one in self._take(path):
            output = one.add_prompts(path, query, scaling, output)
            self._tell_changes(one, path, one.mixture.attention_change, query, scaling)
        return output

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete one adapter's mixture; see `BaseTunerLayer.delete_adapter`."""
        super().delete_adapter(adapter_name)
        self.connect()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002  # PEFT's
        """Refuse: see `MoAModel`."""
        raise UsageError(MERGE_REFUSAL)

    def unmerge(self) -> None:
        """Do nothing: nothing is ever merged."""

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
        for parameter in mixture.parameters():
            # PEFT may have put a file's weights here, at the addresses that they have in the file. A CPU rounds products
            # with a misaligned weight otherwise, and a loaded adapter would not be bit-equal to the saved one.
            parameter.data = parameter.data.clone()

    def _replicate_for_data_parallel(self) -> Self:
        """Refuse `nn.DataParallel`: torch calls this for each module that it is about to copy to another device."""
        raise RunError(
            "nn.DataParallel cannot run a mixture: its copies of the model would share the hooks, and with them the weights, of "
            "the first one. Start one process for each GPU, as `accelerate launch` and `torchrun` do, or show this process only "
            "one GPU with CUDA_VISIBLE_DEVICES=0"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if memo and id(self.block.module) not in memo:
            return self  # one of the block's modules is copied, as for modules_to_save: it keeps its hooks
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    @property
    def has_prompts(self) -> bool:
        """Whether an adapter with prompts is at work."""
        return any(map(self.has_prompts_of, self._active()))

    def has_prompts_of(self, adapter: str) -> bool:
        """Whether an adapter has prompts in this block."""
        attention = self.block.sites.get("attention")
        return attention is not None and attention.path in self.mixtures()[adapter].modules_changed

    def mixtures(self) -> dict[str, Mixture]:
        """The mixtures by adapter name."""
        return dict(self.moa_mixture.items())  # type: ignore[arg-type]  # ModuleDict is untyped

    def _active(self) -> list[str]:
        if self._disable_adapters:
            return []
        mixed = self.watch.mixed
        active = self._active_adapter if mixed is None else mixed.adapters
        return [one for one in ([active] if isinstance(active, str) else active) if one in self.moa_mixture]

    def _hook_pre(self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """Begin a call of the block, and put the call's tokens among its arguments, which a recomputation replays."""
        self._state.end()
        self._state.in_call = True
        if not self._needs_tokens:
            return None
        if self.watch.current is None and self.training and torch.is_grad_enabled():
            raise RunError(
                f"{self.block.path} is recomputed without its arguments, or called by itself, so its router cannot know which "
                "tokens are real: use model.gradient_checkpointing_enable() with transformers 5.23 or newer, or no "
                "checkpointing, and call the whole model"
            )
        return args, {**kwargs, ARGUMENT: self.watch.current}

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        """End a call of the block.

        Raises:
            RunError: If it came to its end and an expert was left out; without an output it was cut short by an error.
        """
        state = self._state
        is_whole = not state.in_call or (state.routed and not state.passes)
        state.end()
        if output is not None and not is_whole and self._active():
            self._refuse_replaced()
            raise RunError(f"{self.block.path} has ended, and a layer in it that experts add to has not run")

    def _refuse_replaced(self) -> None:
        """Refuse a block in which another module stands where one with a hook was: its experts would add nothing."""
        hooked = {self.block.projection_input_path: self.block.projection_input}
        hooked |= {one.path: one.module for one in self.block.sites.values()}
        for path, module in hooked.items():
            if module is not self.block.module.get_submodule(path.removeprefix(f"{self.block.path}.")):
                raise RunError(
                    f"{path} was replaced after the adapter was put on, as fp8 training and quantisation do, so that the adapter "
                    "would add nothing there: convert the base model first, and put the adapter on it then"
                )

    def _note_block_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        self._state.block_input = args[0]

    def _receive_tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """Take the call's tokens out of the attention's arguments, to which the block passes them on."""
        if ARGUMENT not in kwargs:
            raise RunError(
                f"{self.block.path} does not pass its keyword arguments on to its attention, so its router cannot know "
                "which tokens are real: this model can have no balance loss and no instance gates"
            )
        self._state.call = kwargs[ARGUMENT]
        return args, {key: value for key, value in kwargs.items() if key != ARGUMENT}

    def _route(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        """Begin the passes of the active adapters where q, k and v read their tokens; a forward pre-hook."""
        state = self._state
        tell = self._tell if self._is_observed(self.observer) else None
        mixed = self.watch.mixed
        begin = MixturePass if mixed is None else mixed.passes(args[0])
        state.routed = True
        state.passes = tuple(
            [
                begin(name, self.moa_mixture[name], f"{self.block.path}.{name}", state.call, tell)  # type: ignore[arg-type]  # ModuleDict is untyped
                for name in self._active()
            ]
        )
        state.modules_left = len({path for one in state.passes for path in one.mixture.modules_changed})
        state.tokens = args[0].shape[:2]
        for one in state.passes:
            one.route(args[0], state.block_input)
        state.call, state.block_input = None, None

    def _add(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ARG002
        """Add the experts' changes to a module's output; a forward hook, and the one place that adds."""
        if not self._state.passes and not self._active():
            return output
        # some MLPs give their router's scores as well
        own = output[0] if isinstance(output, tuple) else output
        x, frozen = args[0], own
        if x.dim() != 3 or own.dim() != 3:  # a mixture of experts may have put all rows into one
            x, frozen = (one.view(*self._state.tokens, -1) for one in (x, own))
        elif self._state.passes and x.shape[:2] != self._state.tokens:
            raise RunError(
                f"{path} was given {list(x.shape[:2])} rows and tokens of the block's {list(self._state.tokens)}: its gates are "
                "of whole rows, so the model must not run it in parts (tiled MLP)"
            )
        total = frozen
        for one in self._take(path):
            total = one.add_changes(path, x, frozen, total)
            self._tell_changes(one, path, one.mixture.linear_change, x, frozen)
        total = total if frozen is own else total.view_as(own)
        return (total, *output[1:]) if isinstance(output, tuple) else total

    def _take(self, path: str) -> list[MixturePass]:
        """The passes that change a module's output; all end with the block's last such module.

        Raises:
            RunError: If the module runs outside of a pass.
        """
        if self._disable_adapters:
            return []
        state = self._state
        taken = [one for one in state.passes if path in one.mixture.modules_changed]
        if taken:
            state.modules_left -= 1
            if state.modules_left == 0:
                state.passes = ()
        elif any(path in self.mixtures()[name].modules_changed for name in self._active()):
            self._refuse_replaced()
            raise RunError(
                f"{path} ran before the router of its block: this model does not run its attention first; "
                "name its parts in MoAConfig(architecture=ArchitectureConfig(...))"
            )
        return taken

    def _is_observed(self, observer: Callable[..., None] | None) -> bool:
        """Whether an observer is called in this pass."""
        return observer is not None and self._state.in_call and not is_compiling()

    def _tell(self, adapter: str, router: str, routing: Routing) -> None:
        if self.observer is None:
            return
        names = (
            self.mixtures()[adapter].gate_names if router == "" else map(str, range(routing.gates.shape[-1]))
        )
        self.observer(
            GateRecord(
                adapter=adapter,
                router=router,
                names=tuple(names),
                gates=routing.gates.detach(),
                threshold=None if routing.threshold is None else routing.threshold.detach(),
                balance_loss=routing.balance_loss,
            )
        )

    def _tell_changes(
        self, one: MixturePass, path: str, change: Callable[..., Tensor], x: Tensor, *given: Any
    ) -> None:
        """Tell the observer what each expert adds at a module; ``change`` computes it of a place, x, the rest and a gate."""
        observer = self.change_observer
        if observer is None or not self._is_observed(observer):
            return
        for place in one.mixture.modules_changed[path].places:
            gate, under = one.gate_or_one(place, x), partial(change, place, x, *given)
            with torch.no_grad():  # computed once more, by the expert alone
                own = under(gate)
            observer(
                ChangeRecord(
                    adapter=one.adapter,
                    expert=place.name,
                    path=place.site.path,
                    gate=gate.detach(),
                    change=own,
                    under=under,
                )
            )


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Within the context, prepare a model's mixtures once for all calls without gradients; see `Mixture.packed`.

    PEFT's ``generate`` does so by itself. Calls of a model that transformers has loaded by itself, and loops of one's own that
    call the model many times without training it, are faster inside; their numbers are the same.

    Args:
        model: Any model; one without a mixture is left as it is.
    """
    with ExitStack() as stack:
        for mixture in mixtures_of(model):
            stack.enter_context(mixture.packed())
        yield


def mixture_layers(model: nn.Module) -> list[tuple[str, MoALayer]]:
    """Find a model's layers with mixtures, in the order of the blocks.

    Args:
        model: Any model; wrapped by PEFT or loaded by transformers alone.

    Returns:
        Names and layers; empty when the model carries no mixture.
    """
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoALayer)]


def mixtures_of(model: nn.Module) -> list[Mixture]:
    """Find a model's mixtures, of every block and adapter; see `mixture_layers`."""
    return [mixture for _, layer in mixture_layers(model) for mixture in layer.mixtures().values()]


def _reads_block(mixture: Mixture) -> bool:
    return mixture.router is not None and mixture.router.config.router_input == "block"
