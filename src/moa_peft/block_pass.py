"""One adapter's way through one pass of a block: its gates, and what its experts and routers have read so far.

It begins where q, k and v read the block's tokens and ends with the block's last expert; a checkpointed block begins anew
in its recomputation.

Sizes: B rows, T tokens of a row, M = B * T, D_in of an input, C gates of a block, N copies of an expert.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from moa_peft.architecture import AttentionSite
from moa_peft.experts.base import AttentionExpert, Bottleneck
from moa_peft.fused import add_attended, add_rows, cast, compute_dtype, rows_of, stacked
from moa_peft.kept_weights import KeptWeights
from moa_peft.layer import Place
from moa_peft.plan import PROJECTION_INPUT, Columns, Plan, Reader, Work
from moa_peft.products import at_least_float32
from moa_peft.router import Router, Routing
from moa_peft.tokens import CallTokens

Made = TypeVar("Made")

Tell = Callable[[Plan, str, Routing], None]
"""Takes an adapter's plan, a router's name, and what it said."""


class RouterWeights(NamedTuple):
    """What a router needs beside the joint product of its input."""

    sizes: list[int]
    """How many rows each of its layers has."""
    bias: Tensor | None
    """Float32, [K, 1], of all its layers together; None where none has one."""


class InputWeights(NamedTuple):
    """The weights of everything that reads one input."""

    joined: Tensor
    """In the dtype of the products, [K, D_in]."""
    sizes: list[int]
    """How many of the K rows each reader has."""
    readers: list[Bottleneck | RouterWeights]


class BlockPass:
    """One adapter in one pass of a block.

    Args:
        plan: The adapter's mixture, and what of it runs where.
        call: The tokens of the call; None where no router needs them.
        tell: Is told of every router.

    Attributes:
        uses: How many of the plan's modules have yet to run.
    """

    __slots__ = (
        "_call", "_copies", "_gates", "_inputs", "_kept", "_read", "_routed", "_shape", "_tell", "mixture",
        "plan", "uses",
    )  # fmt: skip

    def __init__(self, plan: Plan, call: CallTokens | None, tell: Tell) -> None:
        self.plan, self.mixture, self.uses = plan, plan.mixture, plan.uses
        self._call, self._tell = call, tell
        self._kept: KeptWeights | None = None
        self._shape: tuple[int, int] = (0, 0)  # B, T
        self._gates: Sequence[Tensor] = ()  # [1, M], one for each column
        self._copies: dict[str, Tensor] = {}  # [B, T, N]
        self._inputs: dict[str, Tensor] = {}  # [..., D_in]
        self._read: dict[str, tuple[Bottleneck, Tensor]] = {}  # [K, M]
        self._routed: dict[str, tuple[RouterWeights, Tensor]] = {}  # [K, M]

    def route(self, projection_input: Tensor, block_input: Tensor | None) -> None:
        """Make the block's gates, and those of the copies at the attention, which see no tokens themselves.

        Args:
            projection_input: Float, [B, T, D_in], what q, k and v read.
            block_input: Float, [B, T, D_in], for routers that read it.
        """
        mixture = self.mixture
        self._shape = shape = projection_input.shape[:-1]  # type: ignore[assignment]  # the stub knows no lengths
        if not (mixture.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self._kept = mixture.kept
            self._kept.begin(mixture, decoding=shape[1] == 1)
        self.read(PROJECTION_INPUT, projection_input)
        router = self.plan.router
        if router is not None:
            x = projection_input if router.config.router_input == "projection" else block_input
            assert x is not None, "a block's input is noted before its projections run"
            self._gates = self._as_rows(self._block_gates(router, x)).split(1)
        for place in self.plan.copied_at_attention:
            self._copies[place.name] = self._copy_weights(place, projection_input)

    def gate(self, place: Place, x: Tensor | None = None) -> Tensor | None:
        """Join a block's gate for an expert with the weights of its copies.

        Args:
            place: The expert.
            x: Float, [B, T, D_in], what the expert reads; None at the attention.

        Returns:
            Float32, [B, T, N]; None where there is no router: a gate of 1.
        """
        block = self._gates[place.column].view(*self._shape, 1) if self._gates else None
        if place.name not in self.plan.copied:
            return block
        copies = self._copies[place.name] if x is None else self._copy_weights(place, x)
        return copies if block is None else block * copies

    def read(self, name: str, x: Tensor, factors: tuple[Tensor, Tensor] | None = None) -> None:
        """Multiply an input by the weights of everything that reads it, once for as long as it is the same tensor.

        Args:
            name: The input's.
            x: Float, [..., D_in].
            factors: As for `rows_of`.
        """
        readers = self.plan.readers.get(name)
        if readers is None or self._inputs.get(name) is x:
            return
        self._inputs[name] = x
        dtype = compute_dtype(x)
        weights = self._found((name, dtype))
        if weights is None:
            weights = self._keep((name, dtype), _input_weights(readers, dtype))
        product = rows_of(x, weights.joined, factors)
        parts = (product,) if len(readers) == 1 else product.split_with_sizes(weights.sizes)
        for reader, its, rows in zip(readers, weights.readers, parts, strict=True):
            if isinstance(its, RouterWeights):
                self._routed[reader.name] = its, rows
            else:
                self._read[reader.name] = its, rows

    def add(
        self,
        output: Tensor,
        path: str,
        columns: Columns,
        works: Sequence[Work],
        x: Tensor,
        factors: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Add the changes of fused experts to a module's output, in place.

        Args:
            output: Float, contiguous, [..., D_out]; it is overwritten.
            path: The module's.
            columns: Those of ``output`` that the experts change.
            works: The experts' parts.
            x: Float, [..., D_in], what the module reads.
            factors: Two tensors whose product is ``x``, if any; see `rows_of`.

        Returns:
            ``output``.
        """
        rows: list[Tensor] = []
        for work in works:
            if work.reads_own_input:
                self.read(work.input_name, x, factors)
            rows += self._gated_rows(work)
        dtype = output.dtype
        up = self._found((path, columns, dtype))
        if up is None:
            up = self._keep((path, columns, dtype), self._joined_ups(works, dtype))
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
        rows = query.new_ones((1, 1), dtype=torch.float32) if gate is None else self._as_rows(gate)
        return add_attended(output, query, prompt, rows, scaling)

    def _gated_rows(self, work: Work) -> list[Tensor]:
        """One fused expert's gated rows [N * r, M], and its gates themselves [N, M] where it has a bias."""
        expert, inner = self._read[work.place.name]
        gate = self._gate_rows(work)
        if expert.down_bias is not None:
            inner = inner + cast(expert.down_bias, inner.dtype).unsqueeze(-1)
        if expert.activation is not None:
            inner = expert.activation(inner)
        if expert.scale != 1:
            inner = inner * expert.scale
        rows = inner if gate is None else _gated(inner, gate, expert.up.shape[1])
        if expert.up_bias is None:
            return [rows]
        return [rows, inner.new_ones((1, inner.shape[1])) if gate is None else gate]

    def _joined_ups(self, works: Sequence[Work], dtype: torch.dtype) -> Tensor:
        """What multiplies the gated rows of several experts, [D_out, K]."""
        ups: list[Tensor] = []
        for work in works:
            expert, _ = self._read[work.place.name]
            ups += [expert.up] if expert.up_bias is None else [expert.up, expert.up_bias]
        return stacked(ups, dtype, 1)

    def _found(self, key: object) -> Any:
        """What was made of the mixture's weights and kept for decoding, or None."""
        return None if self._kept is None else self._kept.find(key)

    def _keep(self, key: object, made: Made) -> Made:
        """Keep for decoding what was made of the mixture's weights, where it may be kept, and give it back."""
        if self._kept is not None:
            self._kept.keep(key, made)
        return made

    def _gate_rows(self, work: Work) -> Tensor | None:
        """The gate of a fused expert, float32, [N, M]; None for 1."""
        if work.place.name not in self.plan.copied:
            return self._gates[work.place.column] if self._gates else None
        gate = self.gate(work.place, self._inputs[work.input_name])
        assert gate is not None, "copies have a router"
        return self._as_rows(gate)

    def _as_rows(self, gates: Tensor) -> Tensor:
        """Turn gates [B, T, C] or [B, 1, C] into [C, M]."""
        if gates.shape[:2] != self._shape:
            gates = gates.expand(*self._shape, -1)
        return gates.flatten(0, 1).t()

    def _given(self, name: str) -> Sequence[Tensor] | None:
        """What a router's layers make of its input, float32, [B, T, K] each, where it was read with others."""
        if name not in self._routed:
            return None
        (sizes, bias), rows = self._routed[name]
        rows = at_least_float32(rows)
        if bias is not None:
            rows = rows + bias
        return rows.t().view(*self._shape, -1).split_with_sizes(sizes, -1)

    def _block_gates(self, router: Router, x: Tensor) -> Tensor:
        """The gates of a block's experts, [B, T, C] or [B, 1, C]."""
        if router.config.granularity == "token":
            routing = router(x, self._real(), self._given(""))
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
        self._tell(self.plan, "", routing)
        return routing.gates

    def _copy_weights(self, place: Place, x: Tensor) -> Tensor:
        """The weights of the copies of one expert, [B, T, N]."""
        routing = self.mixture.copy_router(place)(x, self._real(), self._given(place.name))
        self._tell(self.plan, place.name, routing)
        return routing.gates

    def _real(self) -> Tensor | None:
        return None if self._call is None else self._call.real


def _gated(inner: Tensor, gate: Tensor, width: int) -> Tensor:
    """Multiply each copy's rows by its gate: [N * r, M], float32.

    Args:
        inner: Float, [N * r, M], or [r, M] where the copies share it.
        gate: Float32, [N, M].
        width: N * r.
    """
    copies = gate.shape[0]
    if copies == 1:
        return inner * gate
    by_copy = inner.unflatten(0, (-1, width // copies))  # [N or 1, r, M]
    return (by_copy * gate.unsqueeze(1)).flatten(0, 1)


def _input_weights(readers: Sequence[Reader], dtype: torch.dtype) -> InputWeights:
    joined: list[Tensor] = []
    sizes: list[int] = []
    weights: list[Bottleneck | RouterWeights] = []
    for reader in readers:
        if isinstance(reader.module, Router):
            linears = reader.module.linears()
            its = RouterWeights([one.out_features for one in linears], _joined_bias(linears))
            joined += [one.weight for one in linears]
            sizes.append(sum(its.sizes))
        else:
            its = reader.module.bottleneck()
            joined.append(its.down)
            sizes.append(its.down.shape[0])
        weights.append(its)
    return InputWeights(stacked(joined, dtype), sizes, weights)


def _joined_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    if all(one.bias is None for one in linears):
        return None
    biases = [one.weight.new_zeros(one.out_features) if one.bias is None else one.bias for one in linears]
    return at_least_float32(biases[0] if len(biases) == 1 else torch.cat(biases)).unsqueeze(1)
