"""Instance gates that stay with a key-value cache: they follow its rows, its copies and its cuts.

Sizes: B rows, T tokens of the first call on the cache, C gates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import Cache


@dataclass(frozen=True, kw_only=True)
class PromptRecord:
    """What the first call on a cache has found."""

    gates: dict[str, Tensor]
    """Float32, [B, 1, C] each, by block and adapter."""
    prompt: Tensor
    """Bool, [B, T]: the tokens that they are made of."""
    is_told: bool
    """Whether somebody said that the prompt ends there."""
    is_cut: bool = False
    """Whether the cache has lost a part of the prompt since."""

    def ends_within(self, columns: int) -> bool:
        """Whether so many columns of the cache hold all of the prompt."""
        return not bool(self.prompt[:, columns:].any())


class _GateCache:
    """Mixed into the class of a cache that has a record."""

    moa_record: PromptRecord | None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]  # the cache's own class comes next
        self._each(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]  # the cache's own class comes next
        self._each(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]  # the cache's own class comes next
        self._each(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]  # the cache's own class comes next
        self.moa_record = None

    def crop(self, *args: Any, **kwargs: Any) -> None:  # its argument is another one since transformers 5.24
        super().crop(*args, **kwargs)  # type: ignore[misc]  # the cache's own class comes next
        columns = int(self.get_seq_length())  # type: ignore[attr-defined]  # the cache's own class has it
        if self.moa_record is not None and not self.moa_record.ends_within(columns):
            self.moa_record = replace(self.moa_record, is_cut=True) if columns else None

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if (one := self.moa_record) is not None:
            gates = {key: change(gates) for key, gates in one.gates.items()}
            self.moa_record = replace(one, gates=gates, prompt=change(one.prompt))

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (type(self).__bases__[1],), self.__dict__


def remember(past: Cache, record: PromptRecord) -> None:
    """Keep a record with a cache, and let it follow whatever is done to that."""
    # a compiled graph cannot make a class
    if not isinstance(past, _GateCache) and not torch.compiler.is_compiling():
        past.__class__ = _with_gates(type(past))
    past.moa_record = record  # type: ignore[attr-defined]


def record_of(past: Cache | None) -> PromptRecord | None:
    """The record that a cache keeps, if any."""
    return getattr(past, "moa_record", None)


def cache_of(values: Any) -> tuple[str, Any]:
    """Find the key-value cache among a call's keyword arguments, or in what a model gives.

    Args:
        values: A mapping, or a tuple of outputs; anything else holds none.

    Returns:
        The name that transformers gives it there (5.24 renamed it), and the cache; None where there is none.
    """
    if isinstance(values, Mapping):
        held = values.items()
    else:
        held = [("", one) for one in values] if isinstance(values, tuple) else []
    return next(((name, one) for name, one in held if isinstance(one, Cache)), ("", None))


@cache
def _with_gates(kind: type) -> type:
    return type(kind.__name__, (_GateCache, kind), {"__module__": kind.__module__})


def _empty(kind: type) -> Any:
    """A cache with a record, without its contents; for `copy` and `pickle`."""
    return object.__new__(_with_gates(kind))
