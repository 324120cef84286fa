"""Which tokens of a call are real, and which of them are the prompt.

Gates of a whole instance are made of its prompt, so every call has to know where that ends. Exactly these say so:

1. a cache that holds tokens: its first call has left the gates with it (`PromptRecord`), and nothing is pooled again;
2. the argument ``prompt_length``: real tokens at the start of each row;
3. the model's kind: what a classifier or a reward model reads is the prompt, all of it, whatever its labels say;
4. the labels: what comes before the first that counts, in each row or packed sequence (positions that begin again
   without an attention mask tell these apart);
5. ``generate``: the columns that it was given, in each of its own calls;
6. in evaluation mode, a call that begins a cache: it reads a prompt, all of it.

Where none of them does, or where they contradict each other, the call is refused as soon as a router needs the prompt.

Sizes: B rows, T tokens of a row, D hidden size, S packed sequences.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa_peft.errors import UsageError
from moa_peft.mixture.continuous_batching import PagedRequests, holds, paged_requests
from moa_peft.mixture.gate_cache import PromptRecord, cache_of, record_of
from moa_peft.mixture.precision import at_least_float32

LENGTH_ARGUMENT = "prompt_length"
"""The keyword argument of the model that says how many of each row's real tokens are the prompt."""
PROMPT_ARGUMENT = "moa_prompt"
"""What our own callers say of the prompt: its columns (int), labels (Tensor), or why it cannot be known (str)."""
IGNORED_LABEL = -100
NOBODY_SAYS = (
    "instance gates are made of the prompt, and nothing says where it ends in this call: give the model prompt_length=... (real "
    "tokens at the start of each row), or labels that are -100 on the prompt. In evaluation mode a call that begins a cache "
    "(use_cache=True) may be a prompt as a whole. Trainers that keep the labels from the model need prompt_length from the data "
    "collator (label smoothing, compute_loss_func), or cannot train such gates (ORPO, CPO): RouterConfig(granularity='token') can"
)
PROMPT_IS_OPEN = (
    "the cache holds a first part of the text whose call did not say where the prompt ends, so this call may go on with it, and "
    "instance gates are made of the whole prompt in one call: read the prompt without a cache of its beginning, or give the first "
    "call on the cache prompt_length=... if the prompt is over (else its answer goes on one token at a time)"
)
NO_RECORD = (
    "the cache holds tokens but no instance gates of this adapter: another adapter, no adapter or a copy made by hand has filled it, "
    "or it was cut within the prompt. Read the whole prompt into an empty cache"
)
SEVERAL_SEQUENCES = (
    "positions begin again within a row, or a mask of 4 dimensions hides a token from the next, so the row holds several sequences, "
    "and instance gates need a prompt for each: give packed rows with position_ids, labels and use_cache=False, and without an "
    "attention mask, or give one sequence a row"
)


@dataclass(frozen=True, kw_only=True)
class CallTokens:
    """What one call of the model says of its tokens."""

    columns: int = 0
    """T."""
    real: Tensor | None = None
    """Bool, [B, T], False at padding; None where every token is real."""
    prompt: Tensor | None = None
    """Bool, [B, T], the tokens whose mean makes instance gates; None where that is every token."""
    is_told: bool = False
    """Whether somebody said that the prompt ends in this call; else it is a prompt because it begins a cache."""
    unknown: str | None = None
    """Why the prompt cannot be known; None where it is."""
    sequences: Tensor | None = None
    """Int64, [B, T]: which packed sequence of its row a token belongs to; None where a row is one sequence."""
    earlier: Mapping[str, Tensor] = field(default_factory=dict)
    """Instance gates of the first call on the same cache, by block and adapter."""
    paged: PagedRequests | None = None
    """The requests of a call of continuous batching, which keeps their gates itself."""
    found: dict[str, Tensor] = field(default_factory=dict)
    """Instance gates of this call, by block and adapter, detached; for the calls that follow on its cache."""

    def record(self) -> PromptRecord:
        """What the calls that follow on this one's cache need."""
        rows = len(next(iter(self.found.values())))
        prompt = torch.ones(rows, self.columns, dtype=torch.bool) if self.prompt is None else self.prompt
        return PromptRecord(gates=self.found, prompt=prompt, is_told=self.is_told)

    def starts(self) -> Tensor | None:
        """Mark the first token of each packed sequence, bool [B, T]: one for each instance; None without packing."""
        if self.sequences is None:
            return None
        return F.pad(self.sequences[:, 1:] != self.sequences[:, :-1], (1, 0), value=True)

    def mean(self, x: Tensor, *, everything: bool) -> Tensor:
        """Take the mean token of each sequence's prompt.

        Args:
            x: Float, [B, T, D].
            everything: Over all tokens of a row, padding and answer included, as the official code does.

        Returns:
            Float32, [B, 1, D]; with packed sequences [B, T, D], each token with its own sequence's mean.

        Raises:
            UsageError: If the prompt is needed and unknown.
        """
        if self.unknown is not None and not everything:
            raise UsageError(self.unknown)
        if everything or (self.prompt is None and self.sequences is None):
            return at_least_float32(x).mean(dim=1, keepdim=True)
        weight = x.new_ones(x.shape[:2]) if self.prompt is None else self.prompt.to(x.device, x.dtype)
        if self.sequences is None:
            return _means(weight.unsqueeze(1), x)
        sequences = self.sequences.to(x.device)
        same = (sequences.unsqueeze(2) == sequences.unsqueeze(1)) * weight.unsqueeze(1)  # [B, T, T]
        return _means(same, x)


def _means(counted: Tensor, x: Tensor) -> Tensor:
    """Take means of tokens x [B, T, D]: float32, [B, N, D], of those that each row of ``counted`` [B, N, T] marks with 1."""
    number = counted.float().sum(dim=-1, keepdim=True).clamp(min=1)
    part = torch.exp2(-number.log2().ceil())  # a power of 2 rounds nothing; a sum would overflow float16
    return at_least_float32((counted * part.to(x.dtype)) @ x) / (number * part)


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    names = inspect.signature(module.forward).parameters if len(args) > 1 else ("input_ids",)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def real_positions(module: nn.Module, call: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """Number the real tokens of each row from 0, and padding on the left with 0.

    Args:
        module: The module that is called.
        call: The call's arguments by name; the attention mask and the cache are read.
        shape: B and T.

    Returns:
        Int64, [B, T]; None where no mask says which tokens are real, also of those that a cache will hold: one of 4 dimensions
        says it of the call's own alone.
    """
    mask, past = _plain_mask(call), cache_of(call)[1]
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] < shape[1]:
        return None
    if mask.dim() == 4 and (mask.shape[-1] != shape[1] or _keeps_cache(module, call)):
        return None
    real = mask if mask.dim() == 2 else _seen(mask[:, 0], 0).expand(shape)
    return _own_columns((real.bool().long().cumsum(dim=-1) - 1).clamp(min=0), shape[1], past)


def call_tokens(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    pools: bool,
    has_answers: bool = True,
) -> CallTokens:
    """Read a call's arguments by the rule at the head of this file.

    Args:
        module: The model, or its backbone, that is called.
        args: Its positional arguments.
        kwargs: Its keyword arguments; ``attention_mask``, ``labels``, ``position_ids``, ``use_cache``, the cache,
            `LENGTH_ARGUMENT` and `PROMPT_ARGUMENT` are read.
        pools: Whether gates are of whole instances; else only real tokens matter.
        has_answers: Whether the model's rows go on after a prompt; else every real token is the prompt.
    """
    call = arguments_of(module, args, kwargs)
    ids = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if not isinstance(ids, Tensor):
        return CallTokens(unknown=NOBODY_SAYS)
    shape, past = ids.shape[:2], cache_of(call)[1]
    if getattr(call.get("cache"), "cache_allocators", None) is not None:  # continuous batching
        requests, paged = (paged_requests(call) if pools else None) or (None, None)
        return CallTokens(sequences=requests, paged=paged)
    tokens = CallTokens(columns=shape[1], real=_real(_plain_mask(call), shape, past))
    if not pools:
        return tokens
    try:
        if record_of(past) is not None or (past is not None and holds(past.get_seq_length() > 0)):
            return replace(tokens, **_continued(call, record_of(past), shape[1]))
        return replace(tokens, **_begun(module, call, tokens.real, ids, has_answers=has_answers))
    except UsageError as error:
        return replace(tokens, unknown=str(error))


def _continued(call: Mapping[str, Any], record: PromptRecord | None, columns: int) -> dict[str, Any]:
    """The gates of a call on a cache that holds tokens: those of its first call."""
    if record is None or record.is_cut:
        raise UsageError(NO_RECORD)
    if isinstance(call.get(PROMPT_ARGUMENT), str):
        raise UsageError(call[PROMPT_ARGUMENT])
    if call.get(LENGTH_ARGUMENT) is not None:
        raise UsageError(
            f"{LENGTH_ARGUMENT} belongs into the first call on a cache, which keeps what it says"
        )
    if columns > 1 and not record.is_told:
        raise UsageError(PROMPT_IS_OPEN)
    return {"earlier": record.gates, "unknown": NO_RECORD}


def _begun(
    module: nn.Module, call: Mapping[str, Any], real: Tensor | None, ids: Tensor, *, has_answers: bool
) -> dict[str, Any]:
    """The prompt of a call that goes on with nothing."""
    shape, said, length = ids.shape[:2], call.get(PROMPT_ARGUMENT), call.get(LENGTH_ARGUMENT)
    labels = said if isinstance(said, Tensor) else call.get("labels")
    if isinstance(said, str):
        raise UsageError(said)
    if real is None and (mask := _plain_mask(call)) is not None:
        raise UsageError(
            f"instance gates cannot read padding off a {type(mask).__name__} as attention mask: give one of 2 dimensions"
        )
    keeps_cache = _keeps_cache(module, call)
    sequences = None if isinstance(said, int) else _sequences(call, real, shape, keeps_cache=keeps_cache)
    if length is not None:
        return {"prompt": _first_tokens(length, real, sequences, ids), "is_told": True}
    if not has_answers:
        return {"prompt": real, "sequences": sequences, "is_told": True}
    if isinstance(labels, Tensor) and labels.shape == shape:
        return {"prompt": _before_answers(labels, real, sequences), "sequences": sequences}
    if isinstance(said, int):
        columns = (torch.arange(shape[1], device=ids.device) < said).expand(shape)
        return {"prompt": columns if real is None else columns & real, "is_told": True}
    if labels is not None or module.training or not keeps_cache:
        return {"sequences": sequences, "unknown": NOBODY_SAYS}
    return {"prompt": real, "sequences": sequences}


def _first_tokens(length: Any, real: Tensor | None, sequences: Tensor | None, ids: Tensor) -> Tensor:
    """Mark the first real tokens of each row, as many as are the prompt."""
    if sequences is not None:
        raise UsageError(
            f"{LENGTH_ARGUMENT} is given with packed sequences: give labels, or one sequence a row with its attention mask"
        )
    limit = torch.as_tensor(length, device=ids.device).reshape(-1, 1)
    if holds(((limit < 1) | (limit > ids.shape[1])).any()):
        raise UsageError(
            f"{LENGTH_ARGUMENT} must lie in 1..{ids.shape[1]}, the tokens of the call: instance gates need the whole prompt in one"
        )
    counted = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device) if real is None else real
    return counted & (counted.cumsum(dim=1) <= limit)


def _keeps_cache(module: nn.Module, call: Mapping[str, Any]) -> bool:
    """Whether a call leaves a cache behind."""
    if cache_of(call)[1] is not None:
        return True
    config: Any = getattr(module, "config", None)
    default = config is not None and getattr(config.get_text_config(), "use_cache", False)
    return bool(default if call.get("use_cache") is None else call["use_cache"])


def _plain_mask(call: Mapping[str, Any]) -> Any:
    """The attention mask, or one of several for layers of several kinds."""
    mask = call.get("attention_mask")
    return next(iter(mask.values()), None) if isinstance(mask, Mapping) else mask


def _real(mask: Any, shape: torch.Size, past: Any) -> Tensor | None:
    """Find the real tokens of a call in a mask of 2 dimensions, or of 4 where a token that sees itself is real."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return _own_columns(mask, shape[1], past).bool()
    return _seen(_own_columns(mask[:, 0], shape[1], past), 0).expand(shape)


def _own_columns(values: Tensor, columns: int, past: Any) -> Tensor:
    """Take those of a call's own tokens, [..., T], out of all keys', [..., K]: a cache of fixed size has more to come."""
    keys = values.shape[-1]
    if keys <= columns:
        return values
    held = 0 if past is None else past.get_seq_length()  # a tensor in a cache that compiles
    start = held.clamp(max=keys - columns) if isinstance(held, Tensor) else min(held, keys - columns)
    return values[..., torch.arange(columns, device=values.device) + start]


def _seen(mask: Tensor, back: int) -> Tensor:
    """Whether each token sees the one so many before it, bool [B, T - back], in a mask [B, T, T], bool or added."""
    found = mask.diagonal(offset=-back, dim1=-2, dim2=-1)
    return found if found.dtype == torch.bool else found > -1


def _sequences(
    call: Mapping[str, Any], real: Tensor | None, shape: torch.Size, *, keeps_cache: bool
) -> Tensor | None:
    """Number the packed sequences of each row by the positions, which begin again at each; None for one a row.

    Where there are no positions they are told apart by ``cu_seq_lens_q``, where each begins, as flash attention takes it.

    Raises:
        UsageError: If sequences stand in a row whose attention transformers does not part by them.
    """
    mask, positions = _plain_mask(call), call.get("position_ids")
    if shape[1] < 2:
        return None
    parted: list[Tensor] = []  # bool, [B or 1, T - 1] each: a token does not go on from the one before
    if isinstance(positions, Tensor) and positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]  # Qwen-VL's: of the text, then of pictures in time, height and width
    if isinstance(positions, Tensor) and positions.dim() == 2:
        parted.append(positions[:, 1:] != positions[:, :-1] + 1)
    elif isinstance(ends := call.get("cu_seq_lens_q"), Tensor):
        parted.append(torch.isin(torch.arange(1, shape[1], device=ends.device), ends).unsqueeze(0))
    if mask is None and not keeps_cache:
        if not parted or holds(~parted[0].any()):
            return None
        return F.pad(parted[0].expand(shape[0], -1).long().cumsum(dim=1), (1, 0))
    if mask is not None and mask.dim() == 4:
        parted.append(~_seen(mask[:, 0], 1))
    neighbours = True if real is None else real[:, 1:] & real[:, :-1]
    if any(holds((one & neighbours).any()) for one in parted):
        raise UsageError(SEVERAL_SEQUENCES)
    return None


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
