"""One adapter's way through one pass of a block: its gates, and what its experts and routers have read so far.

It begins where q, k and v read the block's tokens and ends with the block's last expert; a checkpointed block begins anew
in its recomputation.

Sizes: B rows, T tokens of a row, D_in of an input, C gates of a block, N copies of an expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moa_peft.architecture import AttentionSite
from moa_peft.experts.base import Bottleneck
from moa_peft.fused import Term, compute_dtype, shared_product, stacked
from moa_peft.layer import Mixture, Place
from moa_peft.plan import PROJECTION_INPUT, Columns, Plan, Work
from moa_peft.router import Router, Routing
from moa_peft.tokens import CallTokens

Tell = Callable[[str, str, tuple[str, ...], Routing], None]
"""Takes an adapter's name, a router's, the names of what it gates, and what it said."""


class BlockPass:
    """One adapter in one pass of a block.

    Args:
        adapter: Its name.
        mixture: Its mixture in this block.
        plan: What of the mixture runs where.
        call: The tokens of the call.
        key: Under what instance gates are kept for the calls that follow.
        tell: Is told of every router.
        decoding: Whether there is one token in each row.

    Attributes:
        uses: How many of the plan's modules have yet to run.
    """

    __slots__ = (
        "_bottlenecks", "_call", "_copies", "_decoding", "_gates", "_inputs", "_key", "_products", "_routed",
        "_tell", "adapter", "mixture", "plan", "uses",
    )  # fmt: skip

    def __init__(
        self,
        adapter: str,
        mixture: Mixture,
        plan: Plan,
        call: CallTokens,
        key: str,
        tell: Tell,
        *,
        decoding: bool,
    ) -> None:
        self.mixture, self.plan, self.uses = mixture, plan, len(plan.work)
        self.adapter, self._call, self._key, self._tell, self._decoding = adapter, call, key, tell, decoding
        self._gates: Sequence[Tensor] = ()  # [B, T, 1] or [B, 1, 1], one for each column
        self._copies: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}
        self._bottlenecks: dict[str, Bottleneck] = {}
        self._routed: dict[str, Sequence[Tensor]] = {}

    def route(self, projection_input: Tensor, block_input: Tensor | None) -> None:
        """Make the block's gates, and those of the copies at the attention, which see no tokens themselves.

        Args:
            projection_input: Float, [B, T, D_in], what q, k and v read.
            block_input: Float, [B, T, D_in], for routers that read it.
        """
        self.read(PROJECTION_INPUT, projection_input)
        router = self.mixture.router
        if router is not None:
            x = projection_input if router.config.router_input == "projection" else block_input
            assert x is not None, "a block's input is noted before its projections run"
            self._gates = self._block_gates(router, x).split(1, -1)
        if self.mixture.copy_routers:
            for place in self.mixture.places:
                if isinstance(place.site, AttentionSite) and place.name in self.mixture.copy_routers:
                    self._copies[place.name] = self._copy_weights(place, projection_input)

    def gate(self, place: Place, x: Tensor | None = None) -> Tensor | None:
        """Join a block's gate for an expert with the weights of its copies.

        Args:
            place: The expert.
            x: Float, [B, T, D_in], what the expert reads; None at the attention.

        Returns:
            Float32, broadcastable to [B, T, N]; None where there is no router: a gate of 1.
        """
        block = self._gates[place.column] if self._gates else None
        if place.name not in self.mixture.copy_routers:
            return block
        copies = self._copies[place.name] if x is None else self._copy_weights(place, x)
        return copies if block is None else block * copies

    def terms(self, work: Work, x: Tensor) -> list[Term]:
        """Give one fused expert's terms of the change of a module's output.

        Args:
            work: The expert's part.
            x: Float, [B, T, D_in], what the module reads.
        """
        place, name = work.place, work.input_name
        if work.reads_own_input:
            self.read(name, x)
        else:
            x = self._inputs[name]
        gate = self.gate(place, x)
        expert, inner = self._bottlenecks[place.name], self._products[place.name]
        if expert.down_bias is not None:
            inner = inner + expert.down_bias.to(inner.dtype)
        if expert.activation is not None:
            inner = expert.activation(inner)
        if expert.up_bias is None:
            return [Term(inner, gate, expert.up, expert.scale)]
        one = torch.ones((1, 1, 1), dtype=torch.float32, device=x.device) if gate is None else gate
        return [Term(inner, gate, expert.up, expert.scale), Term(None, one, expert.up_bias)]

    def read(self, name: str, x: Tensor, factors: tuple[Tensor, Tensor] | None = None) -> None:
        """Multiply an input by the weights of everything that reads it, once for as long as it is the same tensor.

        Args:
            name: The input's.
            x: Float, [B, T, D_in].
            factors: As for `shared_product`.
        """
        if self._inputs.get(name) is x:
            return
        self._inputs[name] = x
        readers = self.plan.readers.get(name)
        if not readers:
            return
        weights: list[Tensor] = []
        for reader in readers:
            if isinstance(reader.module, Router):
                weights += [linear.weight for linear in reader.module.linears()]
            else:
                expert = reader.module.bottleneck()
                self._bottlenecks[reader.name] = expert
                weights.append(expert.down)
        joined = self._joined((name, "down"), weights, compute_dtype(x), 0)
        products = shared_product(x, weights, factors=factors, joined=joined)
        start = 0
        for reader in readers:
            if isinstance(reader.module, Router):
                end = start + len(reader.module.linears())
                self._routed[reader.name] = products[start:end]
                start = end
            else:
                self._products[reader.name] = products[start]
                start += 1

    def joined_ups(
        self, path: str, columns: Columns, terms: Sequence[Term], dtype: torch.dtype
    ) -> Tensor | None:
        """The ups of a site's terms in one where they may be kept for decoding, else None."""
        return self._joined((path, columns), [term.up for term in terms], dtype, 1)

    def _joined(self, key: object, weights: Sequence[Tensor], dtype: torch.dtype, dim: int) -> Tensor | None:
        if torch.is_grad_enabled() or self.mixture.training:
            return None
        return self.mixture.kept.find(
            key, weights, dtype, self._decoding, partial(stacked, weights, dtype, dim)
        )

    def _block_gates(self, router: Router, x: Tensor) -> Tensor:
        """The gates of a block's experts, [B, T, C] or [B, 1, C]."""
        call = self._call
        if router.config.granularity == "token":
            routing = router(x, call.real, self._routed.get("") if router.reads_projection_input else None)
        else:
            official = router.config.pooling == "official"
            if call.earlier is not None and self._key in call.earlier:
                return call.earlier[self._key].to(x.device)
            routing = router(call.mean(x, everything=official), None if official else call.starts())
            if call.paged is not None:
                routing = replace(routing, gates=call.paged.keep(self._key, routing.gates))
            elif not official:
                call.found[self._key] = routing.gates.detach()
        self._tell(self.adapter, "", tuple(self.mixture.gate_names), routing)
        return routing.gates

    def _copy_weights(self, place: Place, x: Tensor) -> Tensor:
        """The weights of the copies of one expert, [B, T, N]."""
        routing = self.mixture.copy_router(place)(x, self._call.real, self._routed.get(place.name))
        names = tuple(str(number) for number in range(routing.gates.shape[-1]))
        self._tell(self.adapter, place.name, names, routing)
        return routing.gates
