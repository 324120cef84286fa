"""Positions that padding on the left does not shift, for models with prompts.

Rotary embedding turns queries by their position and leaves a prompt's keys as they are, so the same text at other positions
attends differently to the prompt. transformers counts padding on the left as positions unless a call names them, as `generate`
does and TRL's GRPO does not.
"""

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moa_peft.mixture.block_hooks import mixture_layers
from moa_peft.mixture.continuous_batching import holds
from moa_peft.mixture.gate_cache import cache_of
from moa_peft.mixture.token_masks import arguments_of, real_positions

_IS_NUMBERED = "moa_is_numbered"
"""A mark of a backbone whose call got its positions here, and of the cache that this call left."""


def number_positions(backbone: nn.Module) -> list[RemovableHandle]:
    """Give a backbone's calls positions where they name none and prompts are at work.

    A call that goes on with a cache is numbered as the cache was. The hooks keep nothing but a mark in the backbone, so copies
    of the model have their own.

    Args:
        backbone: The module that holds the decoder blocks.

    Returns:
        The hooks; none where the backbone does not turn queries, or takes no positions.
    """
    takes_them = "position_ids" in inspect.signature(backbone.forward).parameters
    if not takes_them or not any("rotary" in name for name, _ in backbone.named_modules()):
        return []
    return [
        backbone.register_forward_pre_hook(_number, with_kwargs=True),
        backbone.register_forward_hook(_mark_cache),
    ]


def _number(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    backbone.__dict__[_IS_NUMBERED] = False
    call = arguments_of(backbone, args, kwargs)
    ids = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if call.get("position_ids") is not None or not isinstance(ids, Tensor):
        return None
    _, past = cache_of(call)
    if past is not None and holds(past.get_seq_length() > 0):
        is_wanted = getattr(past, _IS_NUMBERED, False)
    else:
        is_wanted = any(layer.has_prompts for _, layer in mixture_layers(backbone))
    positions = real_positions(backbone, call, ids.shape[:2]) if is_wanted else None
    if positions is None:
        return None
    backbone.__dict__[_IS_NUMBERED] = True
    if "position_ids" in call and "position_ids" not in kwargs:  # by its place
        args, kwargs = (), call
    return args, {**kwargs, "position_ids": positions}


def _mark_cache(backbone: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    if backbone.__dict__.pop(_IS_NUMBERED, False):
        _, past = cache_of(output)
        if past is not None:
            setattr(past, _IS_NUMBERED, True)
