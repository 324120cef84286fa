"""Watches a model's calls, and tells its decoder blocks which tokens are real and which are the prompt.

Attention masks, labels and caches are known where the model is called; gates are made deep inside its blocks, and made
again when a checkpointed block is recomputed. So the call is watched at the model, and what it says (`call_tokens`)
travels to each block as a keyword argument, which recomputation replays.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moa_peft.mixture.gate_cache import cache_of, record_of, remember
from moa_peft.mixture.mixed_batch import MixedBatch
from moa_peft.mixture.token_masks import (
    LENGTH_ARGUMENT,
    PROMPT_ARGUMENT,
    PROMPT_IS_OPEN,
    CallTokens,
    call_tokens,
)

ARGUMENT = "moa_call_tokens"
"""The keyword argument under which a block is told of its call's tokens."""
PREPARE = "prepare_inputs_for_generation"
"""The method of transformers' models through which `generate` makes the arguments of each of its own calls."""
IN_CHUNKS = (
    "prefill_chunk_size reads the prompt in several calls, but instance gates are made of the whole prompt in one: leave it out, "
    "or use a mixture with gates for each token (RouterConfig(granularity='token'))"
)


class TokenWatch:
    """Watches a model's calls and tells its blocks of their tokens. It lives as long as the model's hooks.

    Attributes:
        current: The tokens of the call that runs.
        mixed: Which rows of the call go through which adapter; None where all go through the active ones.
        pools: Whether an adapter has gates of whole instances, so that prompts matter.
        has_answers: Whether the model writes on after a prompt, as a language model does and a classifier does not.
        numbering: Hooks of `number_positions`, which go with the watch's own.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.current: CallTokens | None = None
        self.mixed: MixedBatch | None = None
        self.pools = False
        self.has_answers = True
        self._caller: nn.Module | None = None  # whose call began it
        self._model = model
        self._backbone_is_next = False
        self._handles: list[RemovableHandle] = []
        self.numbering: list[RemovableHandle] = []

    def attach(self, model: nn.Module, backbone: nn.Module, *, pools: bool, has_answers: bool) -> None:
        """Watch a model's calls, and calls of its backbone alone; twice is once.

        Args:
            model: The whole model.
            backbone: The module that holds the decoder blocks.
            pools: Whether the new adapter has gates of whole instances. The model's own `generate` then says what its
                prompt is, whoever calls it: it is replaced on this model, not on its class.
            has_answers: As the attribute.
        """
        self.pools, self.has_answers = self.pools or pools, has_answers
        if pools and hasattr(model, "generate"):
            vars(model)["generate"] = self.generate
        if self._handles:
            return
        self._model = model
        for module in dict.fromkeys((model, backbone)):
            self._handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._end, with_kwargs=True, always_call=True))

    def detach(self) -> None:
        """Take the hooks off, and give the model its class's `generate` back."""
        for handle in (*self._handles, *self.numbering):
            handle.remove()
        self._handles, self.numbering = [], []
        if self._model is not None:
            vars(self._model).pop("generate", None)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model's class does, and say in each of its calls what the prompt is.

        Calls that others make meanwhile, as for a second prompt, are read like any call.

        Raises:
            UsageError: If gates of whole prompts are needed, and the prompt is read in chunks or partly in the cache.
        """
        model: Any = self._model
        said, prepare = _prompt_of_generation(model, args, kwargs), model.prepare_inputs_for_generation
        before = vars(model).get(PREPARE)

        @wraps(prepare)
        def prepare_and_tell(*args: Any, **kwargs: Any) -> dict[str, Any]:
            inputs = prepare(*args, **kwargs)
            going_on = isinstance(said, int) and record_of(cache_of(inputs)[1]) is not None
            return inputs if said is None or going_on else {**inputs, PROMPT_ARGUMENT: said}

        vars(model)[PREPARE] = prepare_and_tell
        try:
            return type(model).generate(model, *args, **kwargs)
        finally:
            vars(model).pop(PREPARE)
            vars(model).update({} if before is None else {PREPARE: before})

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        said = {name: kwargs.pop(name, None) for name in (LENGTH_ARGUMENT, PROMPT_ARGUMENT)}
        inside, self._backbone_is_next = self._backbone_is_next, module is self._model
        if module is self._model or not inside:  # whatever an interrupted call has left
            self._caller = module
            call = {**kwargs, **said}
            self.current = call_tokens(module, args, call, pools=self.pools, has_answers=self.has_answers)
        return args, kwargs

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG002
        if module is not self._caller:
            return
        call, self.current, self._caller, self._backbone_is_next = self.current, None, None, False
        _, past = cache_of(output)
        if call is not None and past is not None and call.found:
            remember(past, call.record())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy it with its model; a copy that does not hold the model, as of one block, has this watch and not a second model."""
        if self._model is not None and id(self._model) not in memo:
            return self
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "current": None, "_caller": None}


def prompt_lengths(model: nn.Module, lengths: Sequence[int] | Tensor) -> dict[str, Tensor]:
    """Say how long each row's prompt is, in a call whose rows go on after it.

    Args:
        model: The model that will be called; a model whose calls are not watched would not know the argument.
        lengths: Real tokens at the start of each row.

    Returns:
        Keyword arguments for the call; none for a model without instance gates.
    """
    return {LENGTH_ARGUMENT: torch.as_tensor(lengths)} if pools(model) else {}


def prompt_labels(model: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """Say by the labels what the prompt is, in a call that is not given them, for its loss is computed elsewhere.

    Args:
        model: As for `prompt_lengths`.
        labels: Int64, [B, T], `IGNORED_LABEL` on the prompt.

    Returns:
        Keyword arguments for the call; none for a model without instance gates.
    """
    return {PROMPT_ARGUMENT: labels} if pools(model) else {}


def pools(model: nn.Module) -> bool:
    """Whether an adapter of the model has gates of whole instances."""
    watches = (getattr(one, "watch", None) for one in model.modules())
    return any(isinstance(watch, TokenWatch) and watch.pools for watch in watches)


def _prompt_of_generation(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    """The columns of the prompt that `generate` is given, or why they are not all of it; None for no prompt."""
    configs = (*args[1:2], kwargs.get("generation_config"), getattr(model, "generation_config", None))
    split = [getattr(one, "prefill_chunk_size", None) for one in configs]
    if any(one is not None for one in (*split, kwargs.get("prefill_chunk_size"))):
        return IN_CHUNKS
    _, past = cache_of(kwargs)
    record = record_of(past)
    if record is not None and any(getattr(one, "is_assistant", False) for one in configs[:-1]):
        # a draft reads the last token before its new ones again, which may be the prompt's
        remember(past, replace(record, is_cut=False))
    elif record is not None and not (record.is_told and record.ends_within(int(past.get_seq_length()) - 1)):
        return PROMPT_IS_OPEN
    given = prompt_given(args, kwargs)
    return None if given is None else given.shape[1]


def prompt_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The prompt, [B, T] or [B, T, D], that `generate` is given; None where it starts from nothing."""
    given = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
    return next((one for one in given if isinstance(one, Tensor)), None)
