"""The prompt's way into attention: transformers' attention interface, with a config copy for each attention.

A custom name at model level would lose the padding mask and be refused by continuous batching. A copy of the config
for each attention module keeps the model's own choice (sdpa, eager, flash, paged) in force: our function calls it.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "moa_prompt"


class _Prompted(NamedTuple):
    """What an attention module needs to call its model's attention and then its prompts."""

    add: Callable[[Tensor, Tensor, float], Tensor]
    config: Any
    eager: Callable[..., Any]


def attend_with_prompts(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend as the model does, then add the block's prompt experts; transformers calls this.

    Args:
        module: The attention module.
        query: Float, [B, H, T, D], after rotary embedding; key and value likewise, with their own heads.
        key: Float.
        value: Float.
        attention_mask: As the model's own attention takes it.
        **kwargs: Passed on; ``scaling`` is read.

    Returns:
        The output [B, T, H, D] and whatever weights the model's attention returns.
    """
    prompted: _Prompted = module.__dict__["moa_prompted"]
    implementation = prompted.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, prompted.eager)
    if implementation in ("eager", "sdpa", "vllm"):
        output, weights = attend(module, query, key, value, attention_mask, **kwargs)
    else:  # flash attention reads its own name off the module's config
        replacement, module.config = module.config, prompted.config
        try:
            output, weights = attend(module, query, key, value, attention_mask, **kwargs)
        finally:
            module.config = replacement
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if output.dim() != 4:  # vLLM's has [T, H * D]
        output = output.view(query.shape[0], query.shape[2], query.shape[1], -1)
    return prompted.add(output, query, scaling), weights


def add_prompts(module: nn.Module, add: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Have an attention module call ``add`` after its model's attention.

    Args:
        module: The attention module.
        add: Takes the output, float [B, T, H, D], the query, float [B, H, T, D] after rotary embedding, and the factor of the
            attention scores; gives the output with the prompts' changes, in its dtype.
    """
    if "moa_prompted" in module.__dict__:
        return
    original = module.config
    eager = sys.modules[type(module).__module__].eager_attention_forward
    module.__dict__["moa_prompted"] = _Prompted(add, original, eager)
    replacement: Any = copy.copy(original)
    replacement._attn_implementation_internal = NAME
    module.config = replacement


def remove_prompts(module: nn.Module) -> None:
    """Put an attention module back as it was."""
    prompted: _Prompted | None = module.__dict__.pop("moa_prompted", None)
    if prompted is not None:
        module.config = prompted.config


AttentionInterface.register(NAME, attend_with_prompts)
