"""Turns an official checkpoint into a mixture: its config read from the weights, its weights put in their places."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from moa_peft.errors import UsageError
from moa_peft.mixture.adapter_file import check_values
from moa_peft.mixture.block_hooks import mixture_layers
from moa_peft.mixture.config import ExpertConfig, RouterConfig, ThresholdConfig
from moa_peft.mixture.experts import LoraExpert, ParallelAdapterExpert, PromptExpert
from moa_peft.mixture.peft_config import MoAConfig
from moa_peft.official.names import (
    KIND_GATES,
    Destination,
    destinations,
    experts_of,
    has_kind_gates,
    layout_of,
)

DEFAULT_ORDER = (
    "lora_q_proj", "lora_k_proj", "lora_v_proj", "prompt", "lora_o_proj", "lora_up_proj", "lora_gate_proj",
    "lora_down_proj", "parallel_adapter",
)  # fmt: skip
"""The official code's order of gate columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialSettings:
    """What the weights of an official checkpoint do not tell; None where nothing is said."""

    alpha: float | None = None
    """LoRA's alpha; a checkpoint with LoRA needs it."""
    expert_order: tuple[str, ...] = DEFAULT_ORDER
    """The gate columns, as names of experts in a mixture."""
    max_threshold: float | None = None
    """Gamma_max of a Sparse MoA with a learned threshold."""
    constant_threshold: float | None = None
    """The threshold of a Sparse MoA with a constant one."""
    keep: int | None = None
    """Experts that a top-k router keeps."""
    instance_level: bool = False
    """Whether the block's gates come from the mean over all tokens, as in the official instance-level code."""
    balance: float | None = None
    """Coefficient of the balance loss; None is our own default."""


def head_size(config: Any) -> int:
    """The size of a head of a model, from its transformers config."""
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def read_config(
    weights: Mapping[str, Tensor], placed: Mapping[str, Destination], settings: OfficialSettings
) -> MoAConfig:
    """Read a mixture's config off an official checkpoint.

    Args:
        weights: The checkpoint by its own names.
        placed: Where each weight goes, from `placed_weights`.
        settings: What the weights do not tell.

    Returns:
        A config that reproduces the official arithmetic, its dead threshold included.

    Raises:
        UsageError: If a weight belongs to nothing that a mixture has, or the settings contradict the weights.
    """
    checkpoint = _Checkpoint(
        blocks=experts_of(placed),
        shapes={(one.block, one.parameter): tuple(weights[name].shape) for name, one in placed.items()},
        parts={(one.block, one.parameter): one.parts for one in placed.values()},
    )
    order = [name for name in settings.expert_order if name in checkpoint.blocks]
    if set(order) != set(checkpoint.blocks):
        lacking = sorted(set(checkpoint.blocks) - set(order))
        raise UsageError(f"expert_order {settings.expert_order} lacks {lacking}")
    router = _router(checkpoint, weights, settings, layout_of(weights))
    if router is not None and router.gate_of == "kind":
        order.sort(key=_kind_position)
    return MoAConfig(experts=_experts(order, checkpoint, settings), router=router)


def placed_weights(weights: Mapping[str, Tensor], head_size: int) -> dict[str, Destination]:
    """Find the place of every weight of a checkpoint, as `destinations` does, and see that each can be one at all.

    Raises:
        UsageError: If a name belongs to nothing that a mixture has, or a weight is empty, has another number of
            dimensions than every such weight, or holds no floats.
    """
    placed = destinations(weights, head_size)
    for name, one in weights.items():
        dimensions = 4 if name.endswith(".prompt_gate") else 1 if name.endswith(".bias") else 2
        if one.dim() != dimensions or not one.numel() or not one.is_floating_point():
            kind = str(one.dtype).removeprefix("torch.")
            raise UsageError(
                f"the weight {name!r} is {kind} {list(one.shape)}: it has to be floats of {dimensions} dimensions, none "
                "of them 0; the checkpoint is damaged, or quantised, which is not supported"
            )
    check_values(weights, "the checkpoint")
    return placed


def load_weights(model: PeftModel, weights: Mapping[str, Tensor], placed: Mapping[str, Destination]) -> None:
    """Copy an official checkpoint into a model whose mixture is of `read_config`'s config.

    Raises:
        UsageError: If a weight has no place, or a place gets no weight.
    """
    parameters = parameters_by_place(model)
    empty = set(parameters)
    with torch.no_grad():
        for name, one in placed.items():
            place = (one.block, one.parameter)
            if place not in parameters:
                raise UsageError(
                    f"cannot place the weight {name!r}: block {one.block} has no {one.parameter}"
                )
            given, shape = weights[name], one.official_shape(parameters[place])
            if shape is None:
                raise UsageError(
                    f"the weight {name!r} is one of {one.parts} in block {one.block}, other blocks have another number"
                )
            if tuple(given.shape) != shape:
                raise UsageError(
                    f"the weight {name!r} is {list(given.shape)}, its place is {list(shape)}: the checkpoint was "
                    "made on another base model, or its weights do not fit each other"
                )
            one.view(parameters[place]).copy_(one.transform(given))
            empty.discard(place)
    if empty:
        raise UsageError(f"the checkpoint lacks weights for {sorted(empty)[:3]} ({len(empty)} in all)")


def parameters_by_place(model: PeftModel) -> dict[tuple[int, str], torch.nn.Parameter]:
    """A mixture's parameters by block and by name in the block."""
    return {
        (layer.block.index, name): parameter
        for _, layer in mixture_layers(model)
        for mixture in layer.mixtures().values()
        for name, parameter in mixture.named_parameters()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Checkpoint:
    """What a checkpoint's names and sizes tell."""

    blocks: Mapping[str, set[int]]
    """The blocks that carry each expert."""
    shapes: Mapping[tuple[int, str], tuple[int, ...]]
    """By block and parameter, that of one copy."""
    parts: Mapping[tuple[int, str], int]
    """By block and parameter: its copies."""

    def layers(self, expert: str) -> tuple[int, ...] | None:
        """The blocks that carry an expert; None where every block with any expert does."""
        everywhere = set().union(*self.blocks.values())
        return None if self.blocks[expert] == everywhere else tuple(sorted(self.blocks[expert]))

    def shape(self, expert: str, parameter: str) -> tuple[int, ...] | None:
        """The shape of one copy's parameter, as "experts.{}.A" has it with the expert's name; None if there is none."""
        return self.shapes.get((min(self.blocks[expert]), parameter.format(expert)))

    def own(self, expert: str, parameter: str) -> tuple[int, int]:
        """The rows of one copy's parameter of an expert, which has to have it, and its copies."""
        place = (min(self.blocks[expert]), f"experts.{expert}.{parameter}")
        if place not in self.shapes:
            raise UsageError(f"the checkpoint has an expert {expert} without its {parameter}")
        return self.shapes[place][0], self.parts[place]


def _kind_position(expert: str) -> int:
    return next(place for place, kind in enumerate(KIND_GATES.values()) if expert.startswith(kind))


def _experts(order: Sequence[str], checkpoint: _Checkpoint, settings: OfficialSettings) -> list[ExpertConfig]:
    def sort_key(name: str) -> tuple[object, ...]:
        """Neighbours with equal keys can share one `LoraExpert`."""
        if not name.startswith("lora_"):
            return (name,)
        shape = checkpoint.shape(name, "experts.{}.A")
        return ("lora", shape and shape[0], checkpoint.layers(name))

    experts: list[ExpertConfig] = []
    for key, group in groupby(order, key=sort_key):
        names = list(group)
        shared: dict[str, Any] = {
            "layers": checkpoint.layers(names[0]), "router": _copy_router(names[0], checkpoint, settings),
        }  # fmt: skip
        if key[0] == "prompt":
            bias = checkpoint.shape("prompt", "copy_routers.{}.logits.linear_bias")
            copies = bias[0] if bias else 1
            length, _ = checkpoint.own("prompt", "vectors")
            experts.append(PromptExpert(length=length // copies, num_experts=copies, **shared))
            continue
        down, up = ("A", "B") if key[0] == "lora" else ("down_weight", "up_weight")
        (_, copies), (size, reading) = checkpoint.own(names[0], up), checkpoint.own(names[0], down)
        shared |= {"num_experts": copies, "shared": copies > 1 and reading == 1}
        if key[0] == "lora":
            targets = tuple(name.removeprefix("lora_") for name in names)
            if settings.alpha is None:
                raise UsageError("the checkpoint has LoRA: give alpha, by which LoRA is scaled")
            experts.append(LoraExpert(targets=targets, rank=size, alpha=settings.alpha, **shared))
        else:
            experts.append(ParallelAdapterExpert(size=size, **shared))
    return experts


def _copy_router(expert: str, checkpoint: _Checkpoint, settings: OfficialSettings) -> RouterConfig | None:
    """The router of an expert's copies: AdaMoLE's has a threshold, top-k's needs ``keep``, the others are softmax."""
    logits = "copy_routers.{}.logits.linear_"
    if checkpoint.shape(expert, f"{logits}weight") is None:
        return None
    bias = checkpoint.shape(expert, f"{logits}bias") is not None
    if checkpoint.shape(expert, "copy_routers.{}.gate.threshold_weight") is not None:
        return RouterConfig(kind="linear", gate="threshold", bias=bias, balance=settings.balance)
    if settings.keep is not None and expert.startswith("lora_"):
        noise = checkpoint.shape(expert, "copy_routers.{}.gate.noise_weight") is not None
        return RouterConfig(
            kind="linear", gate="top-k", keep=settings.keep, noise=noise, bias=bias, balance=settings.balance
        )
    return RouterConfig(kind="linear", gate="softmax", bias=bias)


def _router(
    checkpoint: _Checkpoint, weights: Mapping[str, Tensor], settings: OfficialSettings, layout: str
) -> RouterConfig | None:
    """The block's router; None where the checkpoint has none."""
    sizes = checkpoint.shapes
    block = min(index for index, _ in sizes)
    router_input = "block" if layout == "native" else "projection"
    if has_kind_gates(weights):
        return RouterConfig(
            kind="linear",
            granularity="instance",
            pooling="official",
            gate_of="kind",
            dead_adapter_gate=True,
            router_input=router_input,
        )
    learned = (block, "router.gate.threshold_weight") in sizes
    threshold: ThresholdConfig | None = None
    if learned and settings.max_threshold is None:
        raise UsageError(
            "the checkpoint has a learned threshold: give max_threshold (the official code's is 0.5)"
        )
    if learned:
        threshold = ThresholdConfig(maximum=settings.max_threshold, gradient="none", at_least_one=False)
    elif settings.constant_threshold is not None:
        threshold = ThresholdConfig(constant=settings.constant_threshold, at_least_one=False)
    swiglu = sizes.get((block, "router.logits.w2_weight"))
    if swiglu is None and (block, "router.logits.linear_weight") not in sizes:
        kinds = {name.split("_")[0] for name in checkpoint.blocks}
        if len(kinds) > 1 or threshold is not None:
            raise UsageError(
                f"the checkpoint has no adapter_type_router but {sorted(checkpoint.blocks)}: experts of several kinds, "
                "or a threshold, need one"
            )
        return None
    return RouterConfig(
        kind="linear" if swiglu is None else "swiglu",
        hidden_per_expert=None if swiglu is None else swiglu[1] // swiglu[0],
        threshold=threshold,
        router_input=router_input,
        granularity="instance" if settings.instance_level else "token",
        pooling="official" if settings.instance_level else "prompt",
    )
