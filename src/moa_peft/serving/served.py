"""A run as it is served: its tokenizer and template, and the engine that answers for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig

from moa_peft.data.base_loading import longest_input
from moa_peft.data.templates import Template
from moa_peft.data.tokenization import conversation_ids, prompt_ids
from moa_peft.errors import first_line
from moa_peft.evaluation.generation import end_ids
from moa_peft.evaluation.loading import conversation_template, load, read_adapter
from moa_peft.mixture.token_watch import pools
from moa_peft.serving.batching import Batched
from moa_peft.serving.engines import Engine, OneByOne, Sampling
from moa_peft.serving.protocol import ApiError, Asked

_COMPLETION_TOKENS = 16
"""Most tokens of a plain completion that names no number, as OpenAI has it; a chat completion takes the room there is."""
_ROOM = 4096
"""Tokens of a request, its answer included, of a model that does not say how many it reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A model under a name."""

    engine: Engine
    tokenizer: Any
    template: Template
    """What conversations are written by."""
    ends: frozenset[int]

    def tokens(self, asked: Asked) -> list[int]:
        """The tokens of a request's prompt.

        Raises:
            UsageError: If the template does not take the conversation.
            ApiError: If a token id is none of the tokenizer's, or turns would be left out.
        """
        if isinstance(asked.prompt, str):
            return prompt_ids(asked.prompt, self.tokenizer, "paper")
        if not asked.is_chat:
            ids = cast("list[int]", asked.prompt)
            if not 0 <= min(ids) <= max(ids) < len(self.tokenizer):
                raise ApiError(f"a token id lies outside 0..{len(self.tokenizer) - 1}", parameter="prompt")
            return ids
        turns = cast("list[dict[str, str]]", asked.prompt)
        roles = [one["role"] for one in turns]
        if self.template == "paper" and roles != ["system"] * (len(turns) - 1) + ["user"]:
            raise ApiError(
                "this model was trained on single instructions (template paper): give one user message, after system messages "
                "if any",
                parameter="messages",
            )
        return conversation_ids(turns, self.tokenizer, self.template)

    def sampling(self, asked: Asked, tokens: int) -> Sampling:
        """How a request of so many tokens is continued.

        Raises:
            ApiError: If it has no room.
        """
        room = self.engine.room - tokens
        most = asked.max_tokens or (room if asked.is_chat else min(room, _COMPLETION_TOKENS))
        if not tokens or not 1 <= most <= room:
            more = f", and {asked.max_tokens} more are asked for" if asked.max_tokens else ""
            raise ApiError(
                f"a prompt of {tokens} tokens{more}: this model holds {self.engine.room} in all, and needs one to begin with",
                parameter="messages" if asked.is_chat else "prompt",
                code="context_length_exceeded",
            )
        return Sampling(max_new_tokens=most, temperature=asked.temperature, top_p=asked.top_p)


def load_served(
    runs: Mapping[str, str],
    model: str | None = None,
    template: str | None = None,
    dtype: str | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, tuple[Served, str | None]]:
    """Load runs, and start what answers for them. Runs on one base model hold its weights once.

    Args:
        runs: Adapter folders by the name that they are served under.
        model: As `load` takes it, like dtype and init_kwargs.
        template: Of conversations, as `conversation_template` takes it.
        dtype: Of the base models.
        init_kwargs: Of `from_pretrained`.

    Returns:
        By name what is served, and why it does without continuous batching; None where it does not.

    Raises:
        UsageError: If a run cannot be loaded.
    """
    loaded = {}
    for name, run in runs.items():
        one = load(model, read_adapter(run), dtype=dtype, init_kwargs=init_kwargs)
        for other in loaded.values():
            _share_weights(other.model, one.model)
        loaded[name] = one
    # all of them before the first engine starts a thread, which an error would leave running
    chosen: dict[str, Template] = {name: conversation_template(template, one) for name, one in loaded.items()}
    ends = {name: end_ids(one.model, one.tokenizer, chosen[name]) for name, one in loaded.items()}
    served: dict[str, tuple[Served, str | None]] = {}
    for name, one in loaded.items():
        one.model.get_base_model().generation_config = GenerationConfig()  # a request says everything itself
        room = longest_input(one.model) or _ROOM
        engine, reason = make_engine(one.model, room, sorted(ends[name]), share=len(loaded))
        own = Served(engine=engine, tokenizer=one.tokenizer, template=chosen[name], ends=ends[name])
        served[name] = own, reason
    return served


def make_engine(model: Any, room: int, ends: Sequence[int], *, share: int = 1) -> tuple[Engine, str | None]:
    """Choose the faster engine that answers rightly.

    Returns:
        The engine, and why it is not continuous batching; None where it is.
    """
    if pools(model):
        reason = "its gates are made of whole prompts, which continuous batching may split"
        return OneByOne(model, room, ends), reason
    try:
        return Batched(model, room, ends, share), None
    except Exception as error:  # noqa: BLE001  # transformers raises all kinds for models that it cannot batch
        return OneByOne(model, room, ends), f"continuous batching cannot run it: {first_line(error)}"


def _share_weights(held_by: nn.Module, model: nn.Module) -> None:
    """Let a model use those weights of another that are equal to its own."""
    held = dict(held_by.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, one in list(module._parameters.items()):
            same = held.get(f"{path}.{name}")
            if one is None or one is same or same is None or not one.is_floating_point():
                continue
            if (one.dtype, one.device) == (same.dtype, same.device) and torch.equal(one, same):
                module._parameters[name] = same
