"""Turns an official checkpoint into a mixture: its config read from the weights, its weights put in their places."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from peft import PeftModel
from torch import Tensor

from moa_peft.config import ExpertConfig, RouterConfig, ThresholdConfig
from moa_peft.errors import UsageError
from moa_peft.experts import LoraExpert, ParallelAdapterExpert, PromptExpert
from moa_peft.official.names import Destination, destinations, experts_of, layout_of
from moa_peft.peft_config import MoAConfig
from moa_peft.tuner import mixture_layers

DEFAULT_ORDER = (
    "lora_q_proj", "lora_k_proj", "lora_v_proj", "prompt", "lora_o_proj", "lora_up_proj", "lora_gate_proj",
    "lora_down_proj", "parallel_adapter",
)  # fmt: skip
"""The official code's order of gate columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialSettings:
    """What the weights of an official checkpoint do not tell."""

    alpha: float
    """LoRA's alpha."""
    head_size: int
    """Size of a head of the base model."""
    expert_order: tuple[str, ...] = DEFAULT_ORDER
    """The gate columns, as names of experts in a mixture."""
    max_threshold: float | None = None
    """Gamma_max of a Sparse MoA with a learned threshold."""
    constant_threshold: float | None = None
    """The threshold of a Sparse MoA with a constant one."""


def read_config(weights: Mapping[str, Tensor], settings: OfficialSettings) -> MoAConfig:
    """Read a mixture's config off an official checkpoint.

    Args:
        weights: The checkpoint by its own names.
        settings: What the weights do not tell.

    Returns:
        A config that reproduces the official arithmetic, its dead threshold included.

    Raises:
        UsageError: If a weight belongs to nothing that a mixture has, or the settings contradict the weights.
    """
    placed = destinations(weights, settings.head_size)
    sizes = {(one.block, one.parameter): weights[name].shape for name, one in placed.items()}
    blocks = experts_of(placed)
    order = [name for name in settings.expert_order if name in blocks]
    if set(order) != set(blocks):
        raise UsageError(f"expert_order {settings.expert_order} lacks {sorted(set(blocks) - set(order))}")
    return MoAConfig(
        experts=_experts(order, blocks, sizes, settings),
        router=_router(sizes, settings, layout_of(weights)),
    )


def load_weights(model: PeftModel, weights: Mapping[str, Tensor], head_size: int) -> dict[str, Destination]:
    """Copy an official checkpoint into a model whose mixture fits it.

    Args:
        model: The base with a mixture made of `read_config`'s config.
        weights: The checkpoint by its own names.
        head_size: Size of a head of the base model.

    Returns:
        Where each weight went.

    Raises:
        UsageError: If a weight has no place, or a place gets no weight.
    """
    parameters = parameters_by_place(model)
    placed = destinations(weights, head_size)
    empty = set(parameters)
    with torch.no_grad():
        for name, one in placed.items():
            place = (one.block, one.parameter)
            if place not in parameters:
                raise UsageError(
                    f"cannot place the weight {name!r}: block {one.block} has no {one.parameter}"
                )
            parameters[place].copy_(one.transform(weights[name]))
            empty.discard(place)
    if empty:
        raise UsageError(f"the checkpoint lacks weights for {sorted(empty)[:3]} ({len(empty)} in all)")
    return placed


def parameters_by_place(model: PeftModel) -> dict[tuple[int, str], torch.nn.Parameter]:
    """A mixture's parameters by block and by name in the block."""
    return {
        (layer.block.index, name): parameter
        for _, layer in mixture_layers(model)
        for mixture in layer.mixtures().values()
        for name, parameter in mixture.named_parameters()
    }


def _experts(
    order: Sequence[str],
    blocks: Mapping[str, set[int]],
    sizes: Mapping[tuple[int, str], Sequence[int]],
    settings: OfficialSettings,
) -> list[ExpertConfig]:
    everywhere = set().union(*blocks.values())

    def layers(name: str) -> tuple[int, ...] | None:
        return None if blocks[name] == everywhere else tuple(sorted(blocks[name]))

    def size(name: str, parameter: str) -> int:
        return sizes[min(blocks[name]), f"experts.{name}.{parameter}"][0]

    def sort_key(name: str) -> tuple[object, ...]:
        """Neighbours with equal keys can share one `LoraExpert`."""
        is_lora = name.startswith("lora_")
        return ("lora", size(name, "A"), layers(name)) if is_lora else (name, layers(name))

    experts: list[ExpertConfig] = []
    for key, group in groupby(order, key=sort_key):
        names = list(group)
        if key[0] == "lora":
            targets = tuple(name.removeprefix("lora_") for name in names)
            rank = size(names[0], "A")
            experts.append(
                LoraExpert(targets=targets, rank=rank, alpha=settings.alpha, layers=layers(names[0]))
            )
        elif key[0] == "prompt":
            experts.append(PromptExpert(length=size("prompt", "vectors"), layers=layers("prompt")))
        else:
            inner = size("parallel_adapter", "down.weight")
            experts.append(ParallelAdapterExpert(size=inner, layers=layers("parallel_adapter")))
    return experts


def _router(
    sizes: Mapping[tuple[int, str], Sequence[int]], settings: OfficialSettings, layout: str
) -> RouterConfig:
    block = min(index for index, _ in sizes)
    learned = (block, "router.threshold.weight") in sizes
    threshold: ThresholdConfig | None = None
    if learned and settings.max_threshold is None:
        raise UsageError(
            "the checkpoint has a learned threshold: give max_threshold (the official code's is 0.5)"
        )
    if learned:
        threshold = ThresholdConfig(maximum=settings.max_threshold, gradient="none", at_least_one=False)
    elif settings.constant_threshold is not None:
        threshold = ThresholdConfig(constant=settings.constant_threshold, at_least_one=False)
    swiglu = sizes.get((block, "router.logits.w2.weight"))
    if swiglu is None and (block, "router.logits.linear.weight") not in sizes:
        raise UsageError("the checkpoint has no adapter_type_router: this method is not a Soft or Sparse MoA")
    return RouterConfig(
        kind="linear" if swiglu is None else "swiglu",
        hidden_per_expert=None if swiglu is None else swiglu[1] // swiglu[0],
        threshold=threshold,
        router_input="block" if layout == "native" else "projection",
    )
