"""Greedy answers in batches, with left padding and an end for each row by itself; what ends an answer, and how `generate` draws one."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import GenerationConfig
from transformers.cache_utils import CacheLayerMixin

from moa_peft.data.templates import Template
from moa_peft.data.tokenization import end_token_id
from moa_peft.errors import UsageError
from moa_peft.evaluation.batching import padded_call, plan_batches, rotary_switch
from moa_peft.evaluation.scoring import TOKEN_BUDGET
from moa_peft.mixture.gate_cache import cache_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One generated answer."""

    text: str
    """The answer, without special tokens."""

    num_tokens: int
    """Tokens generated, the end token included."""

    stopped: Literal["end", "length"]
    """Whether the model ended its answer, or the answer was cut off at the longest length allowed."""


def end_ids(model: Any, tokenizer: "PreTrainedTokenizerBase", template: Template = "paper") -> frozenset[int]:
    """The tokens that end an answer: those of the tokenizer, of the model's generation settings, and of the chat template."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = stated if isinstance(stated, list | tuple) else [stated]
    of_turn = end_token_id(tokenizer, template) if template == "chat" else None
    return frozenset(one for one in (*several, tokenizer.eos_token_id, of_turn) if isinstance(one, int))


def generation_config(
    *, max_new_tokens: int, ends: Sequence[int], temperature: float = 0.0, top_p: float = 1.0
) -> GenerationConfig:
    """Settings of transformers' `generate` for one answer; at temperature 0 the likeliest tokens, else drawn ones."""
    draws = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    how = draws if temperature > 0 else {"do_sample": False}
    return GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=list(ends), pad_token_id=ends[0], **how
    )


def plan_prompts(prompts: Sequence[Sequence[int]], batch_size: int, max_new_tokens: int) -> list[list[int]]:
    """Plan the batches of prompts for `generate_batch`; places in ``prompts``, the longest first."""
    return plan_batches(
        [len(one) + max_new_tokens for one in prompts],
        batch_size=batch_size,
        token_budget=4 * TOKEN_BUDGET,  # of these only the prompts are read in one pass
    )


@torch.inference_mode()
def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: Collection[int],
    has_ended: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue each prompt with the likeliest token until it ends; a row that has ended costs nothing more.

    Nothing of the model's own generation settings is used (no sampling, no penalties). In float32 a row's tokens do
    not depend on the batch; in half precision two tokens of all but equal likelihood may change places.

    Args:
        model: A causal language model of transformers, bare or in PEFT's wrapper, in evaluation mode.
        prompts: Token ids of each prompt; at least one each.
        max_new_tokens: Most tokens to add to each.
        ends: Tokens that end an answer.
        has_ended: Told a row's place and its new tokens, says whether it needs no more; None for never.

    Returns:
        The new tokens of each prompt; the last is one of ``ends``, unless it was cut off or needed no more.

    Raises:
        UsageError: If the model gives no cache to go on from.
    """
    switch = rotary_switch(model)
    if switch is not None and len(prompts) > 1 and max(map(len, prompts)) + max_new_tokens > switch:
        return [_alone(model, row, one, max_new_tokens, ends, has_ended) for row, one in enumerate(prompts)]
    call = padded_call(model, prompts)
    mask = call["attention_mask"]
    replies: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    outcome = model(**call, use_cache=True)
    while True:
        new = outcome.logits[:, -1].argmax(dim=-1)  # [B], of the rows still running
        for row, token in zip(running, new.tolist(), strict=True):
            replies[row].append(token)
        going = [
            place
            for place, row in enumerate(running)
            if replies[row][-1] not in ends
            and len(replies[row]) < max_new_tokens
            and not (has_ended is not None and has_ended(row, replies[row]))
        ]
        if not going:
            return replies
        name, cache = cache_of(outcome)
        if cache is None:
            raise UsageError(
                f"{type(model).__name__} gives no cache of transformers, so that its answers cannot be generated here: its "
                "likelihoods can be evaluated (--mode likelihood)"
            )
        if len(going) < len(running):
            chosen = torch.tensor(going, device=mask.device)
            cache.reorder_cache(chosen)
            mask, new = mask[chosen], new[chosen]
            running = [running[place] for place in going]
        mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)
        if switch is not None and len(prompts) == 1 and mask.shape[1] == switch + 1:
            text = [*prompts[0], *replies[0]]  # what the cache holds was turned by other frequencies
            outcome = model(**padded_call(model, [text], prompts=[len(prompts[0])]), use_cache=True)
            continue
        outcome = model(
            input_ids=new[:, None],
            # a model of recurrent states alone would read a step's mask as that of its inputs
            attention_mask=mask if any(isinstance(one, CacheLayerMixin) for one in cache.layers) else None,
            position_ids=mask.sum(dim=-1, keepdim=True) - 1,
            use_cache=True,
            **{name: cache},
        )


def _alone(
    model: Any,
    row: int,
    prompt: Sequence[int],
    max_new_tokens: int,
    ends: Collection[int],
    has_ended: Callable[[int, list[int]], bool] | None,
) -> list[int]:
    """One reply of `generate_batch`, by itself."""
    whole = None if has_ended is None else lambda _, reply: has_ended(row, reply)
    (reply,) = generate_batch(model, [prompt], max_new_tokens=max_new_tokens, ends=ends, has_ended=whole)
    return reply


def as_generation(
    tokens: Sequence[int], ends: Collection[int], tokenizer: "PreTrainedTokenizerBase"
) -> Generation:
    """Decode the tokens of one answer and say how it ended."""
    ended = tokens[-1] in ends
    text = tokenizer.decode(list(tokens[:-1] if ended else tokens), skip_special_tokens=True)
    assert isinstance(text, str)
    return Generation(text=text, num_tokens=len(tokens), stopped="end" if ended else "length")
