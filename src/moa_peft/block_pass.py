"""One adapter's way through one pass of a block: its gates, and what its experts and routers have read so far.

It begins where q, k and v read the block's tokens and ends with the block's last expert; a checkpointed block begins anew
in its recomputation.

Sizes: B rows, T tokens of a row, M = B * T, D_in of an input, C gates of a block, N copies of an expert.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from moa_peft.architecture import AttentionSite
from moa_peft.experts.base import AttentionExpert
from moa_peft.fused import (
    Into,
    Joined,
    add_attended,
    add_rows,
    compute_dtype,
    multiply,
    multiply_through,
    stacked,
)
from moa_peft.kept_weights import KeptWeights
from moa_peft.layer import Place
from moa_peft.plan import PROJECTION_INPUT, Columns, Group, Plan, Source, Work
from moa_peft.products import at_least_float32, cast
from moa_peft.router import Read, Router, Routing, RowsOfRows, WeightsOfRows
from moa_peft.tokens import CallTokens

Made = TypeVar("Made")

Tell = Callable[[Plan, str, Routing], None]
"""Takes an adapter's plan, a router's name, and what it said."""


class InputWeights(NamedTuple):
    """The weights of everything that reads one input."""

    joined: Joined
    sizes: list[int]
    """How many of the K rows each group of experts and each layer of a router has."""
    groups: tuple[Group, ...]
    routers: list[tuple[str, int, WeightsOfRows]]
    """Names, numbers of layers, and what makes gates of the rows."""
    block_gates: RowsOfRows | None
    """What makes the gates alone of the rows of the block's router, which are the last and then not among ``routers``."""

    def multiply(self, x: Tensor) -> Sequence[Tensor]:
        """Multiply an input, [..., D_in]: a part for each of ``sizes``, [K_part, M]."""
        return self._cut(multiply(x, self.joined))

    def multiply_through(self, x: Tensor, into: Into) -> tuple[Tensor, Sequence[Tensor]]:
        """Do what `multiply` does on the input's way into a module, which is to read the first tensor given back."""
        through, product = multiply_through(x, self.joined, into)
        return through, self._cut(product)

    def _cut(self, product: Tensor) -> Sequence[Tensor]:
        return (product,) if len(self.sizes) == 1 else product.split_with_sizes(self.sizes)


class BlockPass:
    """One adapter in one pass of a block.

    Args:
        plan: The adapter's mixture, and what of it runs where.
        call: The tokens of the call; None where no router needs them.
        tell: Is told of every router; None where nobody wants to know.
        observed: Whether somebody looks at the routers; also where a recomputation, which must do the same, tells nobody.

    Attributes:
        uses: How many of the plan's modules have yet to run.
    """

    __slots__ = (
        "_call", "_copies", "_gates", "_given", "_inputs", "_kept", "_made", "_observed", "_rows", "_shape", "_tell", "mixture",
        "plan", "uses",
    )  # fmt: skip

    def __init__(
        self, plan: Plan, call: CallTokens | None, tell: Tell | None, *, observed: bool = False
    ) -> None:
        self.plan, self.mixture, self.uses = plan, plan.mixture, plan.uses
        self._call, self._tell, self._observed = call, tell, observed
        self._kept: KeptWeights | None = None
        self._shape: tuple[int, int] = (0, 0)  # B, T
        self._made: Tensor | None = None  # the block's gates, [C, M], if made alone with the product
        self._gates: Sequence[Tensor] = ()  # [C_part, M], one for each part of the plan's
        self._copies: dict[str, Tensor] = {}  # [M, N] or [B, T, N]
        self._inputs: dict[str, tuple[Tensor, Tensor]] = {}  # [..., D_in], as they came and are passed on
        self._given: dict[str, Read] = {}  # what a router's layers made
        self._rows: dict[str, list[Tensor]] = {}  # of each expert; see `gate_group`

    def route(self, projection_input: Tensor, block_input: Tensor | None) -> None:
        """Make the block's gates, and those of the copies at the attention, which see no tokens themselves.

        Args:
            projection_input: Float, [B, T, D_in], what q, k and v read.
            block_input: Float, [B, T, D_in], for routers that read it.
        """
        mixture, plan = self.mixture, self.plan
        self._shape = shape = projection_input.shape[:-1]  # type: ignore[assignment]  # the stub knows no lengths
        if not (mixture.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self._kept = mixture.kept
            self._kept.begin(mixture, decoding=shape[1] == 1)
        _, groups = self._multiply(PROJECTION_INPUT, projection_input, None)
        if plan.router is not None:
            x = projection_input if plan.router.config.router_input == "projection" else block_input
            assert x is not None, "a block's input is noted before its projections run"
            gates = self._made
            if gates is None:
                gates = self._as_rows(self._block_gates(plan.router, x))
            self._gates = gates.split_with_sizes(plan.gate_parts)
        for place in plan.copied_at_attention:
            self._copies[place.name] = self._copy_weights(place.name, projection_input)
        self._gate_experts(PROJECTION_INPUT, groups, compute_dtype(projection_input))

    def gate(self, place: Place, x: Tensor | None = None) -> Tensor | None:
        """Join a block's gate for an expert with the weights of its copies.

        Args:
            place: The expert.
            x: Float, [B, T, D_in], what the expert reads; None at the attention.

        Returns:
            Float32, [B, T, N]; None where there is no router: a gate of 1.
        """
        block = None
        if self._gates:
            part, row = self.plan.gate_rows[place.name]
            block = self._gates[part][row].view(*self._shape, 1)
        if place.name not in self.plan.copied:
            return block
        copies = self._copies[place.name] if x is None else self._copy_weights(place.name, x)
        copies = copies.view(*self._shape, -1)
        return copies if block is None else block * copies

    def read(self, name: str, x: Tensor, into: Into | None = None) -> Tensor:
        """Multiply an input by the weights of everything that reads it, once for as long as it is the same tensor.

        Args:
            name: The input's.
            x: Float, [..., D_in].
            into: The module that it is on its way into, where it shall be read on the way.

        Returns:
            What that module is to read.
        """
        known = self._inputs.get(name)
        if known is not None and (known[0] is x or known[1] is x):
            return x
        passed_on, groups = self._multiply(name, x, into)
        self._gate_experts(name, groups, compute_dtype(x))
        return passed_on

    def add(self, output: Tensor, path: str, columns: Columns, works: Sequence[Work], x: Tensor) -> Tensor:
        """Add the changes of fused experts to a module's output, in place.

        Args:
            output: Float, contiguous, [..., D_out]; it is overwritten.
            path: The module's.
            columns: Those of ``output`` that the experts change.
            works: The experts' parts.
            x: Float, [..., D_in], what the module reads.

        Returns:
            ``output``.
        """
        for work in works:
            if work.reads_own_input:
                self.read(work.input_name, x)
        rows = self._rows[works[0].place.name]
        if len(works) > 1:
            rows = [one for work in works for one in self._rows[work.place.name]]
        dtype = output.dtype
        key = path, columns, dtype
        up = self._found(key)
        if up is None:
            ups = [source() for work in works for source in work.ups]
            up = self._keep(key, stacked(ups, ups[0].dtype if self._kept is None else dtype, 1))
        return add_rows(output, cast(rows[0] if len(rows) == 1 else torch.cat(rows), dtype), up, columns)

    def attend(self, output: Tensor, work: Work, query: Tensor, scaling: float) -> Tensor:
        """Add the change of a prompt to the attention's output; see `add_attended`."""
        place = work.place
        dtype = compute_dtype(query)
        prompt = self._found(("prompt", place.name, dtype))
        if prompt is None:
            expert: AttentionExpert = self.mixture.experts[place.name]  # type: ignore[assignment]  # ModuleDict is untyped
            assert isinstance(place.site, AttentionSite)
            prompt = self._keep(("prompt", place.name, dtype), expert.prompt(place.site, dtype))
        gate = self.gate(place)
        return add_attended(output, query, prompt, None if gate is None else self._as_rows(gate), scaling)

    def _multiply(
        self, name: str, x: Tensor, into: Into | None
    ) -> tuple[Tensor, Iterable[tuple[Group, Tensor]]]:
        """Multiply an input by the weights of everything that reads it.

        Returns:
            The input, to be passed on, and the groups of experts with their rows, [n * r, M]. The rows of routers are noted.
        """
        readers = self.plan.readers.get(name)
        if readers is None:
            return x, ()
        dtype = compute_dtype(x)
        key = name, dtype
        weights: InputWeights | None = self._found(key)
        if weights is None:
            weights = self._keep(key, self._input_weights(name, readers.groups, x.device, dtype))
        if into is not None:
            passed_on, parts = weights.multiply_through(x, into)
        else:
            passed_on, parts = x, weights.multiply(x)
        self._inputs[name] = x, passed_on
        start = len(weights.groups)
        for router, number, weigh in weights.routers:
            self._given[router] = Read(weigh, parts[start : start + number])
            start += number
        if weights.block_gates is not None:
            self._made = weights.block_gates(*[at_least_float32(one) for one in parts[start:]])
        return passed_on, zip(weights.groups, parts, strict=False)  # the routers' come after

    def _gate_experts(
        self, input_name: str, groups: Iterable[tuple[Group, Tensor]], dtype: torch.dtype
    ) -> None:
        """Gate the experts of an input and note their rows."""
        for group, rows in groups:
            gate_group(self._rows, group, rows, self._gate_rows(group, input_name), dtype)

    def _input_weights(
        self, name: str, groups: tuple[Group, ...], device: torch.device, dtype: torch.dtype
    ) -> InputWeights:
        found = self.plan.sources_of(name)
        beside = self.mixture.side_by_side.get(name)
        laid = beside.joined() if beside is not None and beside.sources is found else None
        if laid is None:
            weight = stacked([source() for source in found.weights], dtype)
            joined = Joined(weight, None if found.biases is None else _joined_bias(found.biases))
        else:
            bias = None if laid.bias is None else at_least_float32(laid.bias)
            joined = laid._replace(weight=cast(laid.weight, dtype), bias=bias)
        routers, block_gates = found.routers, self._gates_alone(found.routers, device, dtype)
        if block_gates is not None:
            routers = routers[:-1]
        return InputWeights(
            joined=joined,
            sizes=found.sizes,
            groups=groups,
            routers=[(router, number, one.of_rows(dtype)) for router, one, number in routers],
            block_gates=block_gates,
        )

    def _gates_alone(
        self, routers: Sequence[tuple[str, Router, int]], device: torch.device, dtype: torch.dtype
    ) -> RowsOfRows | None:
        """What makes the gates of the block's router, the last one, if they are all that anybody wants of it."""
        if not routers or routers[-1][0] != "":
            return None
        _, router, _ = routers[-1]
        if router.has_losses or self._observed or self._kept is not None:
            return None
        if torch.is_autocast_enabled(device.type):  # it would round what is to be float32
            return None
        return router.gates_of_rows(dtype)

    def _found(self, key: object) -> Any:
        """What was made of the mixture's weights and kept for decoding, or None."""
        return None if self._kept is None else self._kept.find(key)

    def _keep(self, key: object, made: Made) -> Made:
        """Keep for decoding what was made of the mixture's weights, where it may be kept, and give it back."""
        if self._kept is not None:
            self._kept.keep(key, made)
        return made

    def _gate_rows(self, group: Group, input_name: str) -> Tensor | None:
        """The gates of a group, float32, [n, M], or of the copies of its one expert, [N, M]; None for 1."""
        block = self._gates[group.part] if self._gates else None
        name = group.names[0]
        if name not in self.plan.copied:
            return block
        copies = self._as_rows(self._copy_weights(name, self._inputs[input_name][0]))
        return copies if block is None else copies * block

    def _as_rows(self, gates: Tensor) -> Tensor:
        """Turn gates [M, C], [B, T, C] or [B, 1, C] into [C, M]."""
        if gates.dim() == 2:
            return gates.t()
        if gates.shape[:2] != self._shape:
            gates = gates.expand(*self._shape, -1)
        return gates.flatten(0, 1).t()

    def _block_gates(self, router: Router, x: Tensor) -> Tensor:
        """The gates of a block's experts, [M, C], [B, T, C] or [B, 1, C]."""
        if router.config.granularity == "token":
            routing = self._weighed("", router, x)
        else:
            call = self._call or CallTokens()
            official = router.config.pooling == "official"
            if call.earlier is not None and self.plan.key in call.earlier:
                return call.earlier[self.plan.key].to(x.device)
            routing = router(call.mean(x, everything=official), None if official else call.starts())
            if call.paged is not None:
                routing = routing._replace(gates=call.paged.keep(self.plan.key, routing.gates))
            elif not official:
                call.found[self.plan.key] = routing.gates.detach()
        self._told("", routing)
        return routing.gates

    def _copy_weights(self, name: str, x: Tensor) -> Tensor:
        """The weights of the copies of one expert, [M, N] or [B, T, N]."""
        router: Router = self.mixture.copy_routers[name]  # type: ignore[assignment]  # ModuleDict is untyped
        routing = self._weighed(name, router, x)
        self._told(name, routing)
        return routing.gates

    def _weighed(self, name: str, router: Router, x: Tensor) -> Routing:
        counted = None if self._call is None else self._call.real
        return router(x, counted, self._given.get(name))

    def _told(self, router: str, routing: Routing) -> None:
        """Tell of a router, if somebody wants to know."""
        if self._tell is None:
            return
        if routing.gates.dim() == 2:
            gates, threshold = routing.gates.view(*self._shape, -1), routing.threshold
            if threshold is not None:
                threshold = threshold.expand(len(routing.gates), 1).reshape(*self._shape, 1)
            routing = routing._replace(gates=gates, threshold=threshold)
        self._tell(self.plan, router, routing)


def gate_group(
    noted: dict[str, list[Tensor]], group: Group, rows: Tensor, gate: Tensor | None, dtype: torch.dtype
) -> None:
    """Gate the experts of a group.

    Args:
        noted: Gets the gated rows of each by its name, [N * r, M], and what multiplies its biases [N, M], if it has any.
        group: The group, of n experts.
        rows: Float, [n * N * r, M], or [r, M] of one expert whose N copies share it.
        gate: Float32, [n, M], or [N, M] of the copies of one expert; None for 1.
        dtype: Of the products with what several experts have made; they are cast together.
    """
    (first, *others), _, scale, activation, width, has_up_bias = group
    if activation is not None:
        rows = activation(rows)
    if scale != 1:
        rows = rows * scale
    if others:
        parts = rows.view(len(group.names), width, -1)
        if gate is not None:
            parts = parts * gate.unsqueeze(1)
        for name, part in zip(group.names, cast(parts, dtype).unbind(), strict=True):
            noted[name] = [part]
        return
    if gate is None:
        gated = rows
    elif gate.shape[0] == 1:
        gated = rows * gate
    else:
        by_copy = rows.unflatten(0, (-1, width // len(gate)))  # [N or 1, r, M]
        gated = (by_copy * gate.unsqueeze(1)).flatten(0, 1)
    biases = rows.new_ones((1, rows.shape[1])) if gate is None else gate
    noted[first] = [gated, biases] if has_up_bias else [gated]


def _joined_bias(biases: Sequence[Source | int]) -> Tensor:
    """Join biases to [K, 1], float32; zeros stand where there is none."""
    found = [source if isinstance(source, int) else source() for source in biases]
    like = next(one for one in found if not isinstance(one, int))
    joined = [like.new_zeros(one) if isinstance(one, int) else one for one in found]
    return at_least_float32(joined[0] if len(joined) == 1 else torch.cat(joined)).unsqueeze(1)
