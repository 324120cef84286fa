"""The mixture of one decoder block: its experts, its routers, and the arithmetic of one forward pass.

Experts that are bottlenecks, ``up (gate * scale * activation(down x))``, are computed together: one product with everything
that reads the same input (their down-projections and the routers' layers), gates on the small vectors, one product added to
each module's output. Every other expert computes its own ``change``. All of it is plain torch, so that autograd, autocast,
compilation, sharding and quantised layers need no case of their own.

Sizes: B rows, T tokens of a row, C gates of a block, N copies of an expert, K inner size of a bottleneck with its copies.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_peft.errors import UsageError
from moa_peft.mixture.config import ExpertConfig, RouterConfig
from moa_peft.mixture.experts.base import AttentionExpert, Bottleneck, LinearExpert, ScaledPrompt
from moa_peft.mixture.precision import cast, is_autocast
from moa_peft.mixture.router import Router, Routing, needs_tokens
from moa_peft.mixture.sites import MIXER_INPUT, AttentionSite, LinearSite, Slot
from moa_peft.mixture.token_masks import CallTokens

PlacedExpert = tuple[ExpertConfig, LinearSite | AttentionSite]
"""The config of an expert and the site that it is built for."""

Made = TypeVar("Made")
Tell = Callable[[str, str, Routing], None]
"""Takes the name of an adapter, the name of a router and its result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One expert of a mixture: its name, its site, and its column of the block's gates."""

    name: str
    """As in "lora_q_proj"."""
    column: int
    site: LinearSite | AttentionSite

    @property
    def input_name(self) -> str:
        """Name of the input that its site reads, the same for sites that read the same tensor."""
        return self.site.reads or self.site.name

    @property
    def slot(self) -> Slot | None:
        """The columns of a fused layer's output that it changes; None for all."""
        return self.site.slot if isinstance(self.site, LinearSite) else None


@dataclass(slots=True)
class Readers:
    """Everything that multiplies one input by a weight."""

    joined: list[Place] = field(default_factory=list)
    """Bottlenecks."""
    routers: list[str] = field(default_factory=list)
    """By name: "" for the block's, the expert's for that of its copies."""


@dataclass(slots=True)
class AtModule:
    """The experts that change one module's output."""

    input_name: str
    joined: list[Place] = field(default_factory=list)
    """Bottlenecks."""
    others: list[Place] = field(default_factory=list)
    """Those whose own ``change`` is called."""

    @property
    def places(self) -> list[Place]:
        """All of them."""
        return [*self.joined, *self.others]


class Down(NamedTuple):
    """The weights of everything that reads one input, as one."""

    weight: Tensor
    """[K in all, D_in]: the rows of each bottleneck, then those of each layer of each router."""
    sizes: list[int]
    """Rows of each."""
    bottlenecks: list[Bottleneck]


class Mixture(nn.Module):
    """All experts of one block and one adapter, with their routers. It holds weights and knows no model.

    Attributes:
        places: The experts, in the order they were given.
        gate_names: The block's gates, in order: experts, or kinds of experts.
        router: The block's router; None where every gate is 1.
        copy_routers: Routers of the experts with several copies at their site, by the expert's name.
        readers: What reads each input, by the input's name.
        modules_changed: What changes each module's output, by the module's path.
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
        self.readers: dict[str, Readers] = {}
        self.modules_changed: dict[str, AtModule] = {}
        self._find_readers()
        self._packed: dict[object, Any] | None = None
        self._num_packers = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names, in order."""
        return tuple(place.name for place in self.places)

    @property
    def needs_tokens(self) -> bool:
        """Whether its routing depends on which tokens are real."""
        return any(needs_tokens(router.config) for router in self.routers().values())

    def routers(self) -> dict[str, Router]:
        """Every router by name: the block's as "", those of copies by their expert's name."""
        block = {} if self.router is None else {"": self.router}
        return {**block, **dict(self.copy_routers.items())}  # type: ignore[dict-item]  # ModuleDict is untyped

    def linear_change(self, place: Place, x: Tensor, output: Tensor, gate: Tensor) -> Tensor:
        """Give one expert's change of the whole output of a linear layer or an MLP, by its own ``change``.

        Args:
            place: The expert.
            x: Float, [B, T, D_in], the module's input.
            output: Float, [B, T, D_out], the frozen module's output, all of a fused one.
            gate: Float32, broadcastable to [B, T, N].
        """
        expert: LinearExpert = self.experts[place.name]  # type: ignore[assignment]  # ModuleDict is untyped
        if place.slot is None:
            return expert.change(x, output, gate)
        return place.slot.place(expert.change(x, place.slot.take(output), gate))

    def attention_change(self, place: Place, query: Tensor, scaling: float, gate: Tensor) -> Tensor:
        """Give one expert's change of the attention's output, [B, T, H, D]; see `AttentionExpert.change`."""
        expert: AttentionExpert = self.experts[place.name]  # type: ignore[assignment]  # ModuleDict is untyped
        site = place.site
        assert isinstance(site, AttentionSite)

        def make() -> ScaledPrompt | None:
            prompt = expert.prompt(site, query.dtype)
            return None if prompt is None else prompt.scaled(scaling)

        scaled = self._reused((place.name, query.dtype, scaling), make)
        return expert.change(site, query, scaling, gate) if scaled is None else scaled.change(query, gate)

    def down(self, input_name: str, dtype: torch.dtype) -> Down:
        """Join the weights of everything that reads an input, in the dtype of the input."""
        return self._reused((input_name, dtype), lambda: self._join_down(self.readers[input_name], dtype))

    def up(self, path: str, dtype: torch.dtype) -> Tensor:
        """Join what multiplies the gated vectors of a module's bottlenecks, [D_out, sum of K], in the dtype of its output."""
        return self._reused((path, dtype), lambda: self._join_up(self.modules_changed[path].joined, dtype))

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Within the context, join weights and make a prompt's keys and values once, for all calls without gradients.

        What is kept is dropped at its end, and when the mixture is trained, moved, cast, or loaded with other weights. Weights
        must not be changed in place within it.
        """
        self._num_packers += 1
        if self._packed is None:
            self._packed = {}
        try:
            yield
        finally:
            self._num_packers -= 1
            if not self._num_packers:  # they may overlap and end in any order, as generators do
                self._packed = None

    def train(self, mode: bool = True) -> Self:
        """Switch as torch does, and drop packed weights."""
        self._drop_packed()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._drop_packed()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop_packed()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_num_packers": 0}

    def _drop_packed(self) -> None:
        if self._packed:
            self._packed.clear()

    def _reused(self, key: object, make: Callable[[], Made]) -> Made:
        """Give what is made of weights: from the packed ones, or made now."""
        packed = self._packed
        if packed is None or torch.is_grad_enabled():
            return make()
        if key not in packed:
            made = make()
            if torch.compiler.is_compiling():  # a compiled graph reads what is there and packs nothing
                return made
            packed[key] = made
        return packed[key]

    def _join_down(self, readers: Readers, dtype: torch.dtype) -> Down:
        routers = self.routers()
        bottlenecks = [self._bottleneck(place) for place in readers.joined]
        weights = [one.down for one in bottlenecks]
        weights += [layer.weight for name in readers.routers for layer in routers[name].projections()]
        return Down(_joined(weights, 0).to(dtype), [len(one) for one in weights], bottlenecks)

    def _join_up(self, places: Sequence[Place], dtype: torch.dtype) -> Tensor:
        """Those of a fused layer's projections have zeros in the rows of the others."""
        rows: list[Tensor] = []
        for place in places:
            ups = self._bottleneck(place).ups()
            rows += ups if place.slot is None else [place.slot.place(one.T).T for one in ups]
        return _joined(rows, 1).to(dtype)

    def _bottleneck(self, place: Place) -> Bottleneck:
        expert: LinearExpert = self.experts[place.name]  # type: ignore[assignment]  # ModuleDict is untyped
        found = expert.bottleneck()
        assert found is not None, "an expert is a bottleneck, or is not, from its construction on"
        return found

    def _find_readers(self) -> None:
        """Sort the experts and routers by the inputs that they read and the modules that they change."""
        if self.router is not None and self.router.joins_down_product:
            self.readers[MIXER_INPUT] = Readers(routers=[""])
        for place in self.places:
            changes = self.modules_changed.setdefault(place.site.path, AtModule(place.input_name))
            expert = self.experts[place.name]
            if isinstance(expert, LinearExpert) and expert.bottleneck() is not None:
                self.readers.setdefault(place.input_name, Readers()).joined.append(place)
                changes.joined.append(place)
            else:
                changes.others.append(place)
            if place.name in self.copy_routers:
                self.readers.setdefault(place.input_name, Readers()).routers.append(place.name)

    def _column(self, name: str, kind: str, router: RouterConfig | None) -> int:
        gate_name = kind if router is not None and router.gate_of == "kind" else name
        if gate_name not in self.gate_names:
            self.gate_names.append(gate_name)
        return self.gate_names.index(gate_name)

    def _share_prompt_gate(self) -> None:
        """Give the parallel adapter the prompt's gate, where both are there; its own column is then unused."""
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


class MixturePass:
    """One adapter in one forward pass of a block: its gates, and the gated inner vectors of its bottlenecks.

    Args:
        adapter: The adapter's name.
        mixture: Its mixture.
        key: Under which instance gates are kept for later calls on the same cache.
        call: The tokens of the call; None where no router needs them.
        tell: Called with every routing; None for no observer.
    """

    def __init__(
        self, adapter: str, mixture: Mixture, key: str, call: CallTokens | None, tell: Tell | None
    ) -> None:
        self.adapter, self.mixture, self._key = adapter, mixture, key
        self._call, self._tell = call or CallTokens(), tell
        self._read: dict[str, Tensor] = {}  # inputs whose products are made
        self._routed: set[str] = set()  # routers, by name, whose gates are made
        # by expert, float32, [B, T or 1, N]: the block's times its copies'
        self._gates: dict[str, Tensor] = {}
        self._inner: dict[str, Tensor] = {}  # by expert, [B, T, K]

    def route(self, x: Tensor, block_input: Tensor | None) -> None:
        """Make the block's gates, and the products of everything that reads the input of q, k and v.

        Args:
            x: Float, [B, T, D], the input of q, k and v.
            block_input: Float, [B, T, D], for routers that read the residual stream.
        """
        router = self.mixture.router
        if router is not None and not router.joins_down_product:
            routed = x if router.config.router_input == "projection" else block_input
            if routed is None:
                raise UsageError(
                    f"{self._key}: the block's projections ran before the norm that its router reads (router_input 'block'): name "
                    "the block's first norm in ArchitectureConfig(norm=...), or use router_input 'projection'"
                )
            earlier = self._call.earlier.get(self._key)
            if router.config.granularity == "token":
                self._note("", router(routed, self._call.real))
            elif earlier is not None:  # observers were told of these in the first call on the cache
                self._weigh("", earlier.to(x.device))
            else:
                self._note("", self._instance_routing(router, routed))
        self._multiply(MIXER_INPUT, x)

    def add_changes(self, path: str, x: Tensor, frozen: Tensor, output: Tensor) -> Tensor:
        """Add the changes of a module's experts to its output.

        Args:
            path: The module's.
            x: Float, [B, T, D_in], its input.
            frozen: Float, [B, T, D_out], its own output.
            output: That, with the changes of other adapters.
        """
        changes = self.mixture.modules_changed[path]
        self._multiply(changes.input_name, x)
        for place in changes.others:
            output = output + self.mixture.linear_change(place, x, frozen, self.gate_or_one(place, x))
        if not changes.joined:
            return output
        rows = _joined([self._inner[one.name] for one in changes.joined], -1)
        return _add_product(output, rows, self.mixture.up(path, output.dtype))

    def add_prompts(self, path: str, query: Tensor, scaling: float, output: Tensor) -> Tensor:
        """Add the changes of the experts at the attention to its output, [B, T, H, D]; see `AttentionExpert.change`."""
        for place in self.mixture.modules_changed[path].others:
            output = output + self.mixture.attention_change(
                place, query, scaling, self.gate_or_one(place, query)
            )
        return output

    def gate(self, place: Place) -> Tensor | None:
        """The gate of an expert, float32, [B, T or 1, N]: the block's times that of its copies; None for 1."""
        return self._gates.get(place.name)

    def gate_or_one(self, place: Place, like: Tensor) -> Tensor:
        """The gate of an expert, or a 1, [1, 1, 1], on the device of ``like``."""
        gate = self.gate(place)
        return like.new_ones((1, 1, 1), dtype=torch.float32) if gate is None else gate

    def _multiply(self, input_name: str, x: Tensor) -> None:
        """Multiply an input by the weights of everything that reads it, and gate the results; once."""
        if self._read.get(input_name) is x or input_name not in self.mixture.readers:
            return
        self._read[input_name] = x
        readers, routers = self.mixture.readers[input_name], self.mixture.routers()
        down = self.mixture.down(input_name, x.dtype)
        parts = F.linear(x, down.weight).split_with_sizes(down.sizes, -1)
        products = iter(parts[len(readers.joined) :])
        for name in readers.routers:
            own = [next(products) for _ in routers[name].projections()]
            if name not in self._routed:  # one that reads a second tensor of that name has its gates already
                self._note(name, routers[name](x, self._call.real, own))
        for place, bottleneck, inner in zip(readers.joined, down.bottlenecks, parts, strict=False):
            self._inner[place.name] = bottleneck.gated(inner, self.gate(place))

    def _note(self, router: str, routing: Routing) -> None:
        self._weigh(router, routing.gates)
        if self._tell is not None:
            self._tell(self.adapter, router, routing)

    def _weigh(self, router: str, gates: Tensor) -> None:
        """Multiply the gates of a router's experts by what it gives them."""
        self._routed.add(router)
        given = {router: gates}
        if router == "":
            columns = gates.split(1, -1)
            given = {place.name: columns[place.column] for place in self.mixture.places}
        for name, gate in given.items():
            self._gates[name] = self._gates[name] * gate if name in self._gates else gate

    def _instance_routing(self, router: Router, x: Tensor) -> Routing:
        """One gate for a whole instance, from its mean prompt token; kept for later calls on the same cache."""
        call, official = self._call, router.config.pooling == "official"
        if official and call.sequences is not None:
            raise UsageError(
                "pooling 'official' is the mean of a whole row, and this row holds several sequences: give one a row, or use "
                "pooling 'prompt'"
            )
        routing = router(call.mean(x, everything=official), None if official else call.starts())
        if call.paged is not None:
            return routing._replace(gates=call.paged.keep(self._key, routing.gates))
        if not official:
            call.found[self._key] = routing.gates.detach()
        return routing


def _joined(parts: Iterable[Tensor], dim: int) -> Tensor:
    first, *others = parts
    return torch.cat([first, *others], dim) if others else first


def _add_product(output: Tensor, rows: Tensor, up: Tensor) -> Tensor:
    """Add ``up rows`` to a module's output [..., D_out]."""
    rows = cast(rows, output.dtype)
    if torch.is_grad_enabled() and not is_autocast(output.device):
        # One pass over the output less. Autocast would round the output of a layer that gives float32.
        return torch.addmm(output.flatten(0, -2), rows.flatten(0, -2), up.t()).view(output.shape)
    return output + cast(F.linear(rows, up), output.dtype)
