"""Which tokens of a call are real, which are the prompt, and what earlier calls of a cached sequence found.

Attention masks, labels and caches are known where the model is called; gates are made deep inside its blocks, and made
again when a checkpointed block is recomputed. So the call is watched at the model, and what it says travels to each
block as a keyword argument, which recomputation replays.

Sizes: B rows, T tokens of a row, D hidden size, S packed sequences.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moa_peft.errors import UsageError
from moa_peft.mixture.continuous_batching import PagedRequests, paged_requests
from moa_peft.mixture.precision import at_least_float32

ARGUMENT = "moa_call_tokens"
"""The keyword argument under which a block is told of its call's tokens."""
CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the key-value cache, since 5.24 and before."""

LENGTH_ARGUMENT = "prompt_length"
"""The keyword argument of the model that says how many of each row's real tokens are the prompt."""
IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class CallTokens:
    """What one call of the model says of its tokens."""

    real: Tensor | None = None
    """Bool, [B, T], False at padding; None where every token is real."""
    prompt: Tensor | None = None
    """Bool, [B, T], the tokens whose mean makes instance gates; None where that is every token."""
    sequences: Tensor | None = None
    """Int64, [B, T]: which packed sequence of its row a token belongs to; None where a row is one sequence."""
    earlier: "Mapping[str, Tensor] | None" = None
    """Instance gates of the first call on the same cache, by block and adapter; None in a first call."""
    paged: PagedRequests | None = None
    """The requests of a call of continuous batching, which keeps their gates itself."""
    found: dict[str, Tensor] = field(default_factory=dict)
    """Instance gates of this call, by block and adapter, detached; for the calls that follow on its cache."""

    def starts(self) -> Tensor | None:
        """Mark the first token of each packed sequence, bool [B, T]: one for each instance; None without packing."""
        if self.sequences is None:
            return None
        return torch.nn.functional.pad(self.sequences[:, 1:] != self.sequences[:, :-1], (1, 0), value=True)

    def mean(self, x: Tensor, *, everything: bool) -> Tensor:
        """Take the mean token of each sequence.

        Args:
            x: Float, [B, T, D].
            everything: Over all tokens of a row, padding and answer included, as the official code does.

        Returns:
            Float32, [B, 1, D]; with packed sequences [B, T, D], each token with its own sequence's mean.
        """
        if everything or (self.prompt is None and self.sequences is None):
            return at_least_float32(x).mean(dim=1, keepdim=True)
        chosen = (
            torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if self.prompt is None else self.prompt
        )
        weight = chosen.to(device=x.device, dtype=x.dtype)
        if self.sequences is None:
            number = weight.float().sum(dim=1).clamp(min=1).view(-1, 1, 1)
            return at_least_float32(weight.unsqueeze(1) @ x) / number
        sequences = self.sequences.to(x.device)
        same = (sequences.unsqueeze(2) == sequences.unsqueeze(1)).to(x.dtype) * weight.unsqueeze(
            1
        )  # [B, T, T]
        return at_least_float32(same @ x) / same.float().sum(dim=-1, keepdim=True).clamp(min=1)


class _GateCache:
    """Mixed into the class of a cache that remembers instance gates, so that they follow its rows."""

    moa_instance_gates: dict[str, Tensor] | None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]  # the cache's own class comes next
        self._each(lambda gates: gates.index_select(0, beam_idx.to(gates.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]  # the cache's own class comes next
        self._each(lambda gates: gates[indices.to(gates.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]  # the cache's own class comes next
        self._each(lambda gates: gates.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]  # the cache's own class comes next
        self.moa_instance_gates = None

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.moa_instance_gates is not None:
            self.moa_instance_gates = {key: change(gates) for key, gates in self.moa_instance_gates.items()}


def remember_gates(past: Any, gates: dict[str, Tensor]) -> None:
    """Keep instance gates with a cache, and let them follow whatever is done to its rows.

    Args:
        past: A cache of transformers.
        gates: Float32, [B, 1, C] each, by block and adapter.
    """
    compiling = torch.compiler.is_compiling()  # a compiled graph cannot make a class
    if not isinstance(past, _GateCache) and not compiling:
        past.__class__ = _with_gates(type(past))
    past.moa_instance_gates = gates


@cache
def _with_gates(kind: type) -> type:
    return type(kind.__name__, (_GateCache, kind), {"__module__": kind.__module__})


def prompt_lengths(model: nn.Module, lengths: Sequence[int]) -> dict[str, Tensor]:
    """Say how long each row's prompt is, in a call whose rows go on after it.

    Args:
        model: The model that will be called; a model whose calls are not watched would not know the argument.
        lengths: Real tokens at the start of each row.

    Returns:
        Keyword arguments for the call; none for a model without instance gates.
    """
    watches = (getattr(one, "watch", None) for one in model.modules())
    watched = any(isinstance(watch, TokenWatch) and watch.attached for watch in watches)
    return {LENGTH_ARGUMENT: torch.tensor(lengths)} if watched else {}


class TokenWatch:
    """Watches a model's calls and tells its blocks of their tokens. It lives as long as the model's hooks.

    Attributes:
        current: The tokens of the call that runs.
    """

    def __init__(self) -> None:
        self.current: CallTokens | None = None
        self._caller: nn.Module | None = None  # whose call began it
        self._model: nn.Module | None = None
        self._backbone_is_next = False
        self._width: int | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module, backbone: nn.Module) -> None:
        """Watch a model's calls, and calls of its backbone alone; twice is once.

        Args:
            model: The causal language model.
            backbone: The module that holds the decoder blocks.
        """
        if self._handles:
            return
        self._model = model
        for module in dict.fromkeys((model, backbone)):
            self._handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._end, with_kwargs=True, always_call=True))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def attached(self) -> bool:
        """Whether it watches a model."""
        return bool(self._handles)

    @contextmanager
    def generating(self, width: int) -> Iterator[None]:
        """While a text is generated, know its prompt also where no cache remembers the first call.

        Args:
            width: Columns of the prompt, padding included; whatever a call has beyond them is an answer.
        """
        outer, self._width = self._width, width
        try:
            yield
        finally:
            self._width = outer

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        length = kwargs.pop(LENGTH_ARGUMENT, None)
        inside, self._backbone_is_next = self._backbone_is_next, module is self._model
        if module is self._model or not inside:  # whatever an interrupted call has left
            self._caller = module
            self.current = call_tokens(args, kwargs, length, self._width)
        return args, kwargs

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG002
        if module is not self._caller:
            return
        call, self.current, self._caller, self._backbone_is_next = self.current, None, None, False
        _, cache = cache_of(output)
        if call is not None and cache is not None and call.found:
            remember_gates(cache, call.found)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "current": None, "_caller": None, "_width": None}


def cache_of(values: Any) -> tuple[str, Any]:
    """Find the key-value cache among a call's keyword arguments, or in what a model gives.

    Args:
        values: A mapping; anything else, as a tuple of outputs, holds none.

    Returns:
        Its name, "cache" from transformers 5.24 on and "past_key_values" before, and the cache; None where there is none.
    """
    found = values if isinstance(values, Mapping) else {}
    held = ((name, found[name]) for name in CACHE_NAMES if name in found and found[name] is not None)
    return next(held, (CACHE_NAMES[0], None))


def call_tokens(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], prompt_length: Any = None, width: int | None = None
) -> CallTokens:
    """Read a call's arguments.

    Args:
        args: The model's positional arguments; the first is the tokens, if any.
        kwargs: Its keyword arguments; ``attention_mask``, ``labels``, ``position_ids`` and the cache are read.
        prompt_length: Int, or int [B]: how many real tokens at the start of each row are the prompt.
        width: In generation, the columns of the prompt.

    Returns:
        The prompt is what ``prompt_length`` says, or what comes before the first label that counts (the label of a
        row's first token never does), or the first ``width`` columns; without any of them, every real token.

    Raises:
        UsageError: If ``prompt_length`` is given for packed sequences.
    """
    ids = kwargs.get("input_ids")
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    ids = args[0] if ids is None and args else ids
    if not isinstance(ids, Tensor):
        return CallTokens()
    shape, device = ids.shape[:2], ids.device
    batched = paged_requests(kwargs)
    if batched is not None:
        return CallTokens(sequences=batched[0], paged=batched[1])
    _, past = cache_of(kwargs)
    earlier = getattr(past, "moa_instance_gates", None)
    real = _real(kwargs.get("attention_mask"), shape)
    may_be_packed = real is None and past is None and width is None
    sequences = _sequences(kwargs, shape) if may_be_packed else None
    labels = kwargs.get("labels")
    prompt = real
    if prompt_length is not None:
        if sequences is not None:
            raise UsageError(
                f"{LENGTH_ARGUMENT} is given with packed sequences: give labels, or one sequence a row"
            )
        counted = torch.ones(shape, dtype=torch.bool, device=device) if real is None else real
        limit = torch.as_tensor(prompt_length, device=device).reshape(-1, 1)
        prompt = counted & (counted.cumsum(dim=1) <= limit)
    elif isinstance(labels, Tensor) and labels.shape == shape:
        prompt = _before_answers(labels, real, sequences)
    elif width is not None and width < shape[1]:
        prompt = (torch.arange(shape[1], device=device) < width).expand(shape)
        prompt = prompt if real is None else prompt & real
    return CallTokens(real=real, prompt=prompt, sequences=sequences, earlier=earlier)


def _real(mask: Any, shape: torch.Size) -> Tensor | None:
    """Find the real tokens of a call in a mask of 2 dimensions, or of 4 where a token that sees itself is real."""
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, -shape[1] :].bool()
    if mask.dim() == 4:
        itself = mask[:, 0].diagonal(dim1=-2, dim2=-1).expand(shape)  # [B, T]
        return itself if itself.dtype == torch.bool else itself > -1
    return None


def _sequences(kwargs: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """Number the packed sequences of each row by the positions, which begin again at each; None without positions."""
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or shape[1] < 2:
        return None
    positions = positions.expand(shape)
    starts = positions[:, 1:] != positions[:, :-1] + 1
    return torch.nn.functional.pad(starts.long().cumsum(dim=1), (1, 0))


def _before_answers(labels: Tensor, real: Tensor | None, sequences: Tensor | None) -> Tensor:
    """Mark the real tokens before the first label that counts, in each row or packed sequence."""
    counts = labels != IGNORED_LABEL
    first = torch.ones_like(counts)
    first[:, 1:] = False
    if sequences is not None:
        first[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    elif real is not None:
        first = real & (real.cumsum(dim=1) == 1)
    answers = (counts & ~first).long()
    seen = answers.cumsum(dim=1)
    if sequences is not None:  # count from the start of each sequence
        before = (seen - answers) * first.long()
        seen = seen - before.cummax(dim=1).values
    prompt = seen == 0
    return prompt if real is None else prompt & real
