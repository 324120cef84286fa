"""Decoding: a block's pass for one token of each row, where Python's own time outweighs that of the arithmetic.

It computes what `BlockPass` computes, of the weights that has kept. Whatever has one answer for all tokens is asked beforehand:
what is left is a function for each module, which holds the weights that it needs. Small vectors lie with a row for each
token here, as the modules' outputs do, and need not be turned about.

Sizes: B rows, D_in and D_out of a module, K rows of all weights that read one input, H heads of size D, P vectors of a prompt.
"""

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moa_peft.block_pass import InputWeights
from moa_peft.experts.base import Prompt
from moa_peft.fused import prompt_shares, rows_of
from moa_peft.plan import MLP_INPUT, PROJECTION_INPUT, Columns, Group, Plan, Work
from moa_peft.products import at_least_float32, cast, exact

Add = Callable[[Tensor, Tensor], Tensor]
"""Takes a module's output, [B, 1, D_out] and contiguous, and its input, [B, 1, D_in]; adds the experts' changes to the output
in place, and gives it back."""

Read = Callable[[Tensor], None]
"""Takes a module's input, [B, 1, D_in]."""

Attend = Callable[[Tensor, Tensor, float], Tensor]
"""Takes the attention's output, [B, 1, H, D] and contiguous, its query, [B, H, 1, D], and the factor of its scores; adds the
prompts' changes to the output in place, and gives it back."""


class Decoding:
    """One adapter's way through one block, token after token, for as long as its weights stay.

    Args:
        plan: The adapter's; see `Plan.is_straight`.
        dtype: What the block computes in.

    Attributes:
        route: Makes the gates of each row's next token, of what q, k and v read.
        adds: What changes a module's output, by the module's path.
        attend: What changes the attention's output, if anything does.
        read_mlp: What reads the MLP's input, if anything does.

    Raises:
        KeyError: If `BlockPass` has not kept all that is needed.
    """

    __slots__ = ("_gates", "_has_router", "_rows", "adds", "attend", "read_mlp", "route")

    def __init__(self, plan: Plan, dtype: torch.dtype) -> None:
        kept = plan.mixture.kept
        self._has_router = plan.router is not None
        self._gates: list[Tensor] = []  # float32, [B, C_part] for each of the plan's parts
        self._rows: dict[str, Tensor] = {}  # gated, of each expert, [B, r], and of its bias, [B, 1]
        inputs: dict[str, InputWeights] = {name: kept.made((name, dtype)) for name in plan.readers}
        self.route = self._routing(plan, inputs.pop(PROJECTION_INPUT, None), dtype)
        reads = {name: self._reading(weights) for name, weights in inputs.items()}
        self.read_mlp = reads.get(MLP_INPUT)
        works = [one for site_work in plan.work.values() for _, joint in site_work.joint for one in joint]
        if self.read_mlp and any(one.reads_own_input and one.input_name == MLP_INPUT for one in works):
            self.read_mlp = reads[MLP_INPUT] = _once(self.read_mlp)
        self.adds: dict[str, Add] = {}
        self.attend: Attend | None = None
        for path, site_work in plan.work.items():
            for columns, works in site_work.joint:
                if works[0].place.site.name == "attention":
                    for name in [one.place.name for one in works]:
                        part, _ = plan.gate_rows[name]
                        self.attend = self._attending(part, kept.made(("prompt", name, dtype)), self.attend)
                else:
                    up = kept.made((path, columns, dtype))
                    own = {one.input_name for one in works if one.reads_own_input} - {PROJECTION_INPUT}
                    rows = [row for one in works for row in self._row_names(plan, one, dtype)]
                    before = [self.adds[path]] if path in self.adds else []
                    self.adds[path] = self._adding(rows, columns, up, [reads[name] for name in own], before)

    def _row_names(self, plan: Plan, work: Work, dtype: torch.dtype) -> list[str]:
        """Names of the rows of one expert."""
        name = work.place.name
        weights: InputWeights = plan.mixture.kept.made((work.input_name, dtype))
        has_up_bias = any(group.has_up_bias for group in weights.groups if name in group.names)
        return [name, _bias_of(name)] if has_up_bias else [name]

    def _routing(self, plan: Plan, weights: InputWeights | None, dtype: torch.dtype) -> Read:
        """Give what makes the gates, and multiplies what q, k and v read by the weights of experts."""
        if weights is None:
            return lambda x: None  # noqa: ARG005  # nothing reads it
        joined, bias, late_bias = _product(weights)
        sizes, parts = weights.sizes, plan.gate_parts
        gates, weigh = self._gates, None if plan.router is None else plan.router.gates_of_rows(dtype, 1)
        is_exact = dtype == exact(dtype)
        gatings = [self._gating(group, dtype) for group in weights.groups]
        first, only = len(gatings), gatings[0] if len(gatings) == 1 else None

        def route(x: Tensor) -> None:
            flat = x.squeeze(1)
            product = torch.mm(flat, joined) if bias is None else torch.addmm(bias, flat, joined)
            if late_bias is not None:
                product = product + late_bias
            rows = product.split_with_sizes(sizes, 1)
            if weigh is not None:
                read = rows[first:] if is_exact else [at_least_float32(one) for one in rows[first:]]
                gates[:] = weigh(*read).split_with_sizes(parts, 1)
            if only is not None:
                only(rows[0])
                return
            for gate, one in zip(gatings, rows, strict=False):  # those of the router come after
                gate(one)

        return route

    def _reading(self, weights: InputWeights) -> Read:
        """Give what multiplies an input by the weights of the experts that read it, and gates them."""
        if [len(group.names) for group in weights.groups] == [1]:
            return self._gating_one(weights.groups[0], weights)
        joined, bias = weights.joined.weight.detach(), weights.joined.bias
        sizes, gatings = weights.sizes, [self._gating(group, joined.dtype) for group in weights.groups]

        def read(x: Tensor) -> None:
            parts = rows_of(x.squeeze(1), joined, bias).t().split_with_sizes(sizes, 1)
            for gate, rows in zip(gatings, parts, strict=True):
                gate(rows)

        return read

    def _gating(self, group: Group, dtype: torch.dtype) -> Read:
        """Give what gates the rows of a group of experts, each with one copy, as `gate_group` does."""
        if len(group.names) == 1:
            return self._gating_one(group)
        names, part, scale, activation, width, _ = group
        noted, gates, gated, is_exact = self._rows, self._gates, self._has_router, dtype == exact(dtype)

        def gate_several(rows: Tensor) -> None:
            if activation is not None:
                rows = activation(rows)
            if scale != 1:
                rows = rows * scale
            by_expert = rows.view(-1, len(names), width)
            if gated:
                by_expert = by_expert * gates[part].unsqueeze(2)
            if not is_exact:
                by_expert = cast(by_expert, dtype)
            noted.update(zip(names, by_expert.unbind(1), strict=True))

        return gate_several

    def _gating_one(self, group: Group, weights: InputWeights | None = None) -> Read:
        """Give what gates the rows of one expert.

        Args:
            group: It.
            weights: Of an input that it reads alone; the function then takes that input instead of the rows.
        """
        (name,), part, scale, activation, _, has_up_bias = group
        noted, gates, gated, bias_name = self._rows, self._gates, self._has_router, _bias_of(name)
        joined, bias, late_bias = (None, None, None) if weights is None else _product(weights)

        def gate_one(rows: Tensor) -> None:
            if joined is not None:
                flat = rows.squeeze(1)
                rows = torch.mm(flat, joined) if bias is None else torch.addmm(bias, flat, joined)
            if late_bias is not None:
                rows = rows + late_bias
            if activation is not None:
                rows = activation(rows)
            if scale != 1:
                rows = rows * scale
            gate = gates[part] if gated else None
            if gate is not None:
                rows = rows * gate
            if has_up_bias:
                noted[bias_name] = rows.new_ones((len(rows), 1)) if gate is None else gate
            noted[name] = rows

        return gate_one

    def _adding(
        self, rows: Sequence[str], columns: Columns, up: Tensor, reads: Sequence[Read], before: Sequence[Add]
    ) -> Add:
        """Give what adds the changes of several experts, after those that are added before."""
        noted, dtype, first, up = self._rows, up.dtype, rows[0], up.detach().t().contiguous()
        several = operator.itemgetter(*rows) if len(rows) > 1 else None
        is_exact = dtype == exact(dtype)

        def add_one(output: Tensor, x: Tensor) -> Tensor:
            for read in reads:
                read(x)
            output.squeeze(1).addmm_(noted[first], up)
            return output

        def add(output: Tensor, x: Tensor) -> Tensor:
            for one in before:
                one(output, x)
            for read in reads:
                read(x)
            joined = noted[first] if several is None else torch.cat(several(noted), 1)
            flat = output.squeeze(1)
            if columns is not None:
                flat = flat[:, columns[0] : columns[1]]
            flat.addmm_(joined if is_exact else cast(joined, dtype), up)
            return output

        return add_one if several is None and columns is None and not before and is_exact else add

    def _attending(self, part: int, prompt: Prompt, before: Attend | None) -> Attend:
        """Give what adds the change of a prompt, its heads' scales multiplied in beforehand, after those of others."""
        gates, gated, keys = self._gates, self._has_router, prompt.keys
        values = cast(prompt.values * prompt.head_scale.view(-1, 1, 1), prompt.values.dtype)

        def attend(output: Tensor, query: Tensor, scaling: float) -> Tensor:
            if before is not None:
                before(output, query, scaling)
            vectors = query.squeeze(2).transpose(0, 1)  # [H, B, D]
            shares = prompt_shares(vectors, keys, scaling)  # [H, P, B]
            if gated:
                shares = shares * gates[part].t()
            by_head = output.squeeze(1).transpose(0, 1)  # [H, B, D]
            dtype = output.dtype  # some attentions give another than their query's
            factors = cast(shares, dtype).transpose(1, 2), cast(values, dtype)
            if by_head.is_cpu and not by_head.is_contiguous():  # torch would multiply head by head
                by_head.add_(torch.bmm(*factors))
            else:
                by_head.baddbmm_(*factors)
            return output

        return attend


def _bias_of(name: str) -> str:
    return f"{name}.up_bias"


def _product(weights: InputWeights) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights of an input's product, [D_in, K], and their bias, [1, K]: one that the product adds, or one to add to it.

    Tensors that want gradients cost each operator a microsecond, though none are made.
    """
    joined = weights.joined.weight.detach().t()
    if weights.joined.bias is None:
        return joined, None, None
    bias = weights.joined.bias.detach().t()
    return (joined, bias, None) if bias.dtype == joined.dtype else (joined, None, bias)


def _once(read: Read) -> Read:
    """Read an input once, though several modules read it."""
    last: Tensor | None = None

    def unless_read(x: Tensor) -> None:
        nonlocal last
        if x is not last:
            last = x
            read(x)

    return unless_read
