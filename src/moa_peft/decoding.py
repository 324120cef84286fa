"""Decoding: a block's pass for one token of each row, where Python's own time outweighs that of the arithmetic.

It computes what `BlockPass` computes, of the weights that has kept, with every question asked beforehand that has one answer
for all tokens.

Sizes: B rows, D_in and D_out of a module, H heads of size D, P vectors of a prompt.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moa_peft.block_pass import InputWeights, gate_group
from moa_peft.experts.base import Prompt
from moa_peft.fused import rows_of
from moa_peft.plan import MLP_INPUT, PROJECTION_INPUT, Columns, Plan, Work
from moa_peft.products import at_least_float32, cast, exact

Add = Callable[[Tensor, Tensor], Tensor]
"""Takes a module's output, [B, 1, D_out] and contiguous, and its input, [B, 1, D_in]; adds the experts' changes to the output
in place, and gives it back."""

Read = Callable[[Tensor], None]
"""Takes a module's input, [B, 1, D_in]."""

Attend = Callable[[Tensor, Tensor, float], Tensor]
"""Takes the attention's output, [B, 1, H, D] and contiguous, its query, [B, H, 1, D], and the factor of its scores; adds a
prompt's change to the output in place, and gives it back."""


class Decoding:
    """One adapter's way through one block, token after token, for as long as its weights stay.

    Args:
        plan: The adapter's; see `Plan.is_straight`.
        dtype: What the block computes in.

    Attributes:
        adds: What changes a module's output, by the module's path.
        attends: What changes the attention's output.
        reads: What reads an input that is not that of q, k and v, by its name.
        uses: How many hooked modules of the pass have yet to run.

    Raises:
        KeyError: If `BlockPass` has not kept all that is needed.
    """

    __slots__ = (
        "_gate_parts", "_gate_rows", "_gates", "_inputs", "_logits", "_num_logits", "_of_rows", "_rows", "adds", "attends",
        "reads", "uses",
    )  # fmt: skip

    def __init__(self, plan: Plan, dtype: torch.dtype) -> None:
        kept, router = plan.mixture.kept, plan.router
        self._inputs: dict[str, InputWeights] = {name: kept.made((name, dtype)) for name in plan.readers}
        self._gate_parts, self._gate_rows = plan.gate_parts, plan.gate_rows
        self._gates: Sequence[Tensor] = ()  # [C_part, B], one for each of the parts
        self._rows: dict[str, list[Tensor]] = {}  # of each expert; see `gate_group`
        if router is not None:
            self._logits, self._num_logits = router.logits.of_rows(exact(dtype)), router.logits.num_linears
            self._of_rows = router.gate.of_rows
        self.reads = {
            name: self._read(weights) for name, weights in self._inputs.items() if name != PROJECTION_INPUT
        }
        if MLP_INPUT in self.reads:
            self.reads[MLP_INPUT] = _once(self.reads[MLP_INPUT])
        self.uses = 0
        self.adds: dict[str, Add] = {}
        self.attends: list[Attend] = []
        for path, site_work in plan.work.items():
            for columns, works in site_work.joint:
                if works[0].place.site.name == "attention":
                    names = [one.place.name for one in works]
                    self.attends += [self._attend(one, kept.made(("prompt", one, dtype))) for one in names]
                else:
                    up = kept.made((path, columns, dtype))
                    self.adds[path] = self._add(works, columns, up, self.adds.get(path))

    def route(self, x: Tensor) -> None:
        """Make the gates of each row's next token, [B, 1, D_in]."""
        weights = self._inputs.get(PROJECTION_INPUT)
        if weights is None:
            return
        flat = x.squeeze(1)
        parts = weights.multiply(flat)
        if weights.routers:
            first = len(weights.groups)
            second = first + self._num_logits
            logits = self._logits(*[at_least_float32(one) for one in parts[first:second]])
            rest = [at_least_float32(one) for one in parts[second:]] if len(parts) > second else ()
            self._gates = self._of_rows(flat, logits, *rest).split_with_sizes(self._gate_parts)
        self._gate(weights, parts)

    def _gate(self, weights: InputWeights, parts: Sequence[Tensor]) -> None:
        gates = self._gates
        for group, rows in zip(weights.groups, parts, strict=False):  # those of routers come after
            gate_group(self._rows, group, rows, gates[group.part] if gates else None)

    def _read(self, weights: InputWeights) -> Read:
        """Give what multiplies an input by the weights of the experts that read it, and gates them."""
        noted, joined, bias = self._rows, weights.joined, weights.bias
        group, *others = weights.groups
        if others:
            return lambda x: self._gate(weights, weights.multiply(x.squeeze(1)))

        def read(x: Tensor) -> None:
            gate = self._gates[group.part] if self._gates else None
            gate_group(noted, group, rows_of(x.squeeze(1), joined, bias), gate)

        return read

    def _add(self, works: Sequence[Work], columns: Columns, up: Tensor, before: Add | None) -> Add:
        """Give what adds the changes of several experts, after those that are added before."""
        noted, dtype = self._rows, up.dtype
        names = [one.place.name for one in works]
        only = names[0] if len(names) == 1 else None
        inputs = {one.input_name for one in works if one.reads_own_input} - {PROJECTION_INPUT}
        reads = [self.reads[one] for one in inputs]

        def add(output: Tensor, x: Tensor) -> Tensor:
            if before is not None:
                before(output, x)
            for read in reads:
                read(x)
            rows = noted[only] if only is not None else [one for name in names for one in noted[name]]
            joined = rows[0] if len(rows) == 1 else torch.cat(rows)
            flat = output.squeeze(1)
            if columns is not None:
                flat = flat[:, columns[0] : columns[1]]
            flat.addmm_(cast(joined, dtype).t(), up)
            return output

        return add

    def _attend(self, name: str, prompt: Prompt) -> Attend:
        """Give what adds the change of a prompt: one with its heads' scales multiplied in."""
        keys, values = (
            prompt.keys,
            cast(prompt.values * prompt.head_scale.view(-1, 1, 1), prompt.values.dtype),
        )
        part, _ = self._gate_rows[name]

        def attend(output: Tensor, query: Tensor, scaling: float) -> Tensor:
            vectors = query.squeeze(2).permute(1, 2, 0)  # [H, D, B]
            shares = at_least_float32(torch.bmm(keys, vectors) * scaling).softmax(1)  # [H, P, B]
            if self._gates:
                shares = shares * self._gates[part]
            by_head = output.squeeze(1).transpose(0, 1)  # [H, B, D]
            dtype = output.dtype  # some attentions give another than their query's
            by_head.baddbmm_(cast(shares, dtype).transpose(1, 2), cast(values, dtype))
            return output

        return attend


def _once(read: Read) -> Read:
    """Read an input once, though several modules read it."""
    last: Tensor | None = None

    def unless_read(x: Tensor) -> None:
        nonlocal last
        if x is not last:
            last = x
            read(x)

    return unless_read
