"""A batch whose rows go through different adapters, as PEFT's ``adapter_names`` asks for it.

Each adapter's pass takes its own rows of what the block's modules read and give, and puts its changes back into them.

Sizes: B rows of a call, N names, T tokens of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moa_peft.errors import UsageError
from moa_peft.mixture.mixture import Mixture, MixturePass
from moa_peft.mixture.token_masks import CallTokens

BASE = "__base__"
"""The name, PEFT's, for rows that go through no adapter."""


class MixedBatch:
    """Which rows of a call go through which adapter.

    Args:
        names: An adapter's name for each row, or `BASE`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.adapters = [one for one in dict.fromkeys(names) if one != BASE]
        # then rows are repeated, one beside the other, for beams and returned sequences
        self.is_generating = False
        self._names = names
        self._rows: dict[tuple[int, torch.device], dict[str, tuple[str, Tensor]]] = {}

    def check(self, rows: int) -> None:
        """Check the rows that the caller gives.

        Raises:
            UsageError: If there is not one name for each.
        """
        if rows != len(self._names):
            raise UsageError(
                f"adapter_names has {len(self._names)} names for {rows} rows: give one for each row"
            )

    def passes(self, x: Tensor) -> Callable[..., MixturePass]:
        """What makes the passes of a block that reads ``x`` [B, T, D], called as `MixturePass`.

        Raises:
            UsageError: As `check`; within `generate` each name may stand for several rows.
        """
        batch, device = x.shape[0], x.device
        if (batch, device) not in self._rows:
            repeats, rest = divmod(batch, len(self._names))
            if rest or not (self.is_generating or repeats == 1):
                self.check(batch)
            names = [one for one in self._names for _ in range(repeats)]
            places = {one: [row for row, name in enumerate(names) if name == one] for one in self.adapters}
            self._rows[batch, device] = {
                one: (str(rows), torch.tensor(rows, device=device)) for one, rows in places.items()
            }
        rows = self._rows[batch, device]
        return lambda adapter, *args: RowsPass(*rows[adapter], adapter, *args)


class RowsPass(MixturePass):
    """The pass of an adapter through some rows of a batch.

    Args:
        name: What these rows are called.
        rows: Int64, their places in the batch.
        adapter: As `MixturePass` takes it, like what follows; the tokens are those of the whole call.
        mixture: Its mixture.
        key: With the name, what the gates of the whole instances of these rows are kept under.
        *rest: The tokens and the observer.
    """

    def __init__(self, name: str, rows: Tensor, adapter: str, mixture: Mixture, key: str, *rest: Any) -> None:
        super().__init__(adapter, mixture, f"{key}{name}", *rest)
        self._rows, self._whole = rows, self._call
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}  # inputs by id, with these rows of them

    def route(self, x: Tensor, block_input: Tensor | None) -> None:
        """Route these rows; see `MixturePass.route`."""
        self._call = _of_rows(self._whole, self._rows, self._key)
        super().route(self._part(x), None if block_input is None else self._part(block_input))
        for key, gates in self._call.found.items():  # kept for all rows, as caches reorder them
            kept = gates.new_zeros(len(x), *gates.shape[1:])
            self._whole.found[key] = kept.index_copy(0, self._rows, gates)

    def add_changes(self, path: str, x: Tensor, frozen: Tensor, output: Tensor) -> Tensor:
        """Add the changes to these rows of a module's output; see `MixturePass.add_changes`."""
        rows = self._rows
        changed = super().add_changes(path, self._part(x), frozen[rows], output[rows])
        return output.index_copy(0, rows, changed)

    def add_prompts(self, path: str, query: Tensor, scaling: float, output: Tensor) -> Tensor:
        """Add the changes to these rows of the attention's output; see `MixturePass.add_prompts`."""
        rows = self._rows
        return output.index_copy(0, rows, super().add_prompts(path, query[rows], scaling, output[rows]))

    def _part(self, x: Tensor) -> Tensor:
        """These rows of an input, the same tensor whenever that is read: its products are made once."""
        if id(x) not in self._parts:
            self._parts[id(x)] = x, x[self._rows]
        return self._parts[id(x)][1]


def _of_rows(call: CallTokens, rows: Tensor, key: str) -> CallTokens:
    """What a call says of some rows, and of the gates kept under ``key``."""

    def part(one: Tensor | None) -> Tensor | None:
        return None if one is None else one[rows.to(one.device)]

    earlier = {key: call.earlier[key][rows]} if key in call.earlier else {}
    parts = {name: part(getattr(call, name)) for name in ("real", "prompt", "sequences")}
    return replace(call, **parts, earlier=earlier, found={})
