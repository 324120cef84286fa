"""What is measured: one base model, and copies of it with a method each that share its frozen weights."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from moa_peft.data.base_loading import find_base, load_base
from moa_peft.errors import UsageError, library_errors
from moa_peft.mixture.architecture import find_blocks
from moa_peft.mixture.block_hooks import mixtures_of
from moa_peft.mixture.experts.base import PROJECTIONS
from moa_peft.mixture.mixture import AtModule, Readers
from moa_peft.mixture.peft_config import MoAConfig
from moa_peft.mixture.presets import PAPER_TARGETS, PRESETS, PROMPTLESS_EXPERTS

FROZEN, LORA, LORA_AGAIN, LORA_ALL = "frozen", "peft-lora", "peft-lora-again", "peft-lora-all"
"""The frozen model; PEFT's LoRA of rank 8 on the paper's projections, and once more to see the noise; that on every projection."""
PROMPTLESS = "soft-moa-no-prompt"
"""Soft MoA on the experts that Sparse MoA has."""

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False, "max_position_embeddings": 8192,
    },
}  # fmt: skip
"""Llama models by name, which are built with random weights: speed does not depend on their values."""


def method_names() -> list[str]:
    """Everything that can be measured."""
    return [FROZEN, LORA, LORA_AGAIN, LORA_ALL, PROMPTLESS, *PRESETS]


def base_model(name: str, *, layers: int | None, dtype: torch.dtype, device: str) -> nn.Module:
    """Load or build the frozen model.

    Args:
        name: One of `SHAPES` (random weights), "smollm2", a folder, or a name on the hub.
        layers: Only so many decoder blocks; None for all. For `SHAPES`.
        dtype: Of the weights; rotary tables keep theirs.
        device: As in "cuda".

    Raises:
        UsageError: If there is no such model.
    """
    if name in SHAPES:
        shape = dict(SHAPES[name])
        if layers is not None:
            if layers > shape["num_hidden_layers"]:
                raise UsageError(f"layers is {layers}: {name} has {shape['num_hidden_layers']}")
            shape["num_hidden_layers"] = layers
        config = AutoConfig.for_model("llama", **shape)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        if layers is not None:
            raise UsageError(
                f"layers is {layers}: only the shapes {', '.join(SHAPES)} can be cut to fewer blocks"
            )
        model = load_base(find_base(name, {"dtype": dtype}))
        model.to(device)
    return model.requires_grad_(False)


def with_method(base: nn.Module, method: str, *, num_experts: int | None = None) -> nn.Module:
    """Put one of `method_names` on a copy of the base that shares its weights.

    Args:
        base: The frozen model.
        method: Its name.
        num_experts: Copies of each expert, for one that `has_copies`.

    Raises:
        UsageError: If the method is unknown, or PEFT's LoRA cannot stand where a mixture's does.
    """
    model = copy.deepcopy(base, memo={id(one): one for one in base.parameters()})
    torch.manual_seed(0)
    if method == FROZEN:
        return model
    if method in (LORA, LORA_AGAIN, LORA_ALL):
        return _peft_lora(model, PROJECTIONS if method == LORA_ALL else PAPER_TARGETS)
    if method == PROMPTLESS:
        config = MoAConfig.preset("soft-moa", experts=list(PROMPTLESS_EXPERTS))
    else:
        config = MoAConfig.preset(method, **_copies(method, num_experts))
    tuned = get_peft_model(model, config)
    for parameter in trainable(tuned):  # what is zero at first would hide every error
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return tuned


def _peft_lora(model: nn.Module, targets: Sequence[str]) -> nn.Module:
    """PEFT's LoRA on the layers where a mixture's stands; a fused layer is adapted whole, which takes other parameters."""
    sites = {
        site.path: site.module
        for block in find_blocks(model)
        for one in targets
        for site in block.places(one)
    }
    lora = LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=list(sites),
        fan_in_fan_out=any(isinstance(one, Conv1D) for one in sites.values()),
        task_type="CAUSAL_LM",
    )
    instead = "give --baseline lora, and --methods without PEFT's LoRA"
    with library_errors(f"PEFT's LoRA does not fit this model: {instead}"):
        tuned = get_peft_model(model, lora)
    # of some families PEFT takes the stacked weights of routed experts instead of a layer of the same name
    left_out = sorted(sites.keys() - set(tuned.targeted_module_names))
    if left_out:
        raise UsageError(f"PEFT's LoRA leaves out {left_out[0]}, one of {len(left_out)} layers: {instead}")
    return tuned


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Within the context, ask every expert for its own ``change`` instead of joining those that are bottlenecks."""
    mixtures = mixtures_of(model)
    before = [(one.readers, one.modules_changed) for one in mixtures]
    for one in mixtures:
        one.readers = {
            name: Readers(routers=readers.routers) for name, readers in one.readers.items() if readers.routers
        }
        one.modules_changed = {
            path: AtModule(changes.input_name, others=changes.places)
            for path, changes in one.modules_changed.items()
        }
    try:
        yield
    finally:
        for one, (readers, changed) in zip(mixtures, before, strict=True):
            one.readers, one.modules_changed = readers, changed


def has_copies(method: str) -> bool:
    """Whether every expert of one of `method_names` has copies, whose number can be set."""
    return method in PRESETS and all(getattr(one, "num_experts", 1) > 1 for one in PRESETS[method].experts)


def _copies(method: str, num_experts: int | None) -> dict[str, Any]:
    if num_experts is None:
        return {}
    return {"experts": [{**one.to_dict(), "num_experts": num_experts} for one in PRESETS[method].experts]}


def trainable(model: nn.Module) -> Sequence[nn.Parameter]:
    """The parameters that a method trains."""
    return [one for one in model.parameters() if one.requires_grad]
