"""Where each weight of an official checkpoint goes in a mixture.

Two layouts: "native" (the official LLaMA code: ``layers.0.attention...``) and "fork" (the official transformers fork:
``model.layers.0.self_attn...``). The native code rotates interleaved pairs, transformers rotates halves, so the rows
of B of its LoRA on q and k come in another order.

Sizes: H heads of size D, r rank.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moa_peft.errors import UsageError

Layout = Literal["native", "fork"]
Transform = Callable[[Tensor], Tensor]

_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_MLP_PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_BLOCK = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
_RULES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (
        re.compile(r"(?:self_attn|attention)\.lora_([QKVO])\.lora_([AB])\.weight"),
        lambda m: f"experts.lora_{_PROJECTIONS[m[1].lower()]}.{m[2]}",
    ),
    (
        re.compile(r"(?:mlp|feed_forward)\.lora_(gate|up|down|GATE|UP|DOWN)\.lora_([AB])\.weight"),
        lambda m: f"experts.lora_{_MLP_PROJECTIONS[m[1].lower()]}.{m[2]}",
    ),
    (
        re.compile(r"p_adapter\.(down|up)_proj\.(weight|bias)"),
        lambda m: f"experts.parallel_adapter.{m[1]}.{m[2]}",
    ),
    (re.compile(r"(?:self_attn|attention)\.prompt\.weight"), lambda _: "experts.prompt.vectors"),
    (re.compile(r"(?:self_attn|attention)\.prompt_gate"), lambda _: "experts.prompt.head_scale"),
    (re.compile(r"adapter_type_router\.(w[123])\.(weight|bias)"), lambda m: f"router.logits.{m[1]}.{m[2]}"),
    (re.compile(r"adapter_type_router\.(weight|bias)"), lambda m: f"router.logits.linear.{m[1]}"),
    (re.compile(r"adapter_threshold_fn\.(weight|bias)"), lambda m: f"router.threshold.{m[1]}"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """One weight's place in a mixture."""

    block: int
    parameter: str
    """Its name in the block's `Mixture`."""
    transform: Transform
    """From the official layout to ours; gradients take the same way."""


def layout_of(names: Iterable[str]) -> Layout:
    """Tell the layout by the names: the fork's begin with "model."."""
    return "fork" if any(name.startswith("model.layers.") for name in names) else "native"


def half_split(rows: Tensor, head_size: int) -> Tensor:
    """Reorder rows of interleaved rotary pairs into halves.

    Args:
        rows: Float, [H * D, ...], each head's rows as x0 y0 x1 y1 ...
        head_size: D, even.

    Returns:
        The same shape, each head's rows as x0 x1 ... y0 y1 ...
    """
    pairs = rows.reshape(-1, head_size // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def destinations(names: Iterable[str], head_size: int) -> dict[str, Destination]:
    """Find the place of every official weight.

    Args:
        names: The checkpoint's names.
        head_size: D of the base model.

    Returns:
        A `Destination` for each name.

    Raises:
        UsageError: If a name belongs to nothing that a mixture has.
    """
    names = list(names)
    native = layout_of(names) == "native"
    return {name: _destination(name, head_size, native) for name in names}


def _destination(name: str, head_size: int, native: bool) -> Destination:
    block = _BLOCK.fullmatch(name)
    for pattern, target in _RULES if block else ():
        found = pattern.fullmatch(block[2])  # type: ignore[index]  # not None where there are rules to try
        if found:
            parameter = target(found)
            transform = _transform(parameter, head_size, native)
            return Destination(block=int(block[1]), parameter=parameter, transform=transform)  # type: ignore[index]
    raise UsageError(f"cannot place the weight {name!r}: no part of a mixture goes by that name")


def _transform(parameter: str, head_size: int, native: bool) -> Transform:
    if native and parameter in ("experts.lora_q_proj.B", "experts.lora_k_proj.B"):
        return lambda rows: half_split(rows, head_size)
    if parameter == "experts.prompt.head_scale":  # official: [1, H, 1, 1]
        return lambda scale: scale.reshape(-1)
    return lambda weight: weight


def experts_of(placed: Mapping[str, Destination]) -> dict[str, set[int]]:
    """The experts in a checkpoint, as `lora_q_proj` or `prompt`, and the blocks that carry each."""
    found: dict[str, set[int]] = {}
    for one in placed.values():
        if one.parameter.startswith("experts."):
            found.setdefault(one.parameter.split(".")[1], set()).add(one.block)
    return found
