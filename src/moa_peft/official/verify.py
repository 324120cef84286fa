"""Reference parity: rebuilds the model of a reference file and compares its numbers with ours.

A reference file is one safetensors file: ``base.*``, ``adapter.*`` and ``grad.*`` weights, ``input_ids``, ``labels``,
``logits``, ``loss``, sometimes ``greedy``; its metadata holds every setting as JSON.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from moa_peft.errors import UsageError
from moa_peft.official.checkpoint import idle_routers
from moa_peft.official.importer import (
    DEFAULT_ORDER,
    OfficialSettings,
    load_weights,
    parameters_by_place,
    read_config,
)
from moa_peft.official.names import Destination, destinations
from moa_peft.tuner import GateRecord, mixture_layers

LIMIT = 1e-4
"""Largest allowed error: absolute on logits and loss, relative to the largest entry on each gradient (float32)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What a reference file says against what we compute."""

    name: str
    errors: dict[str, float]
    """Largest absolute error by quantity; for "gradient" relative to the largest entry of each."""
    dtype: str = "float32"
    """What we computed in."""
    failure: str = ""
    """Why nothing could be compared; empty where something was."""

    @property
    def ok(self) -> bool:
        """Whether every error is within `LIMIT`; a NaN is not."""
        return not self.failure and all(error <= LIMIT for error in self.errors.values())

    def line(self) -> str:
        """One line for a person."""
        figures = "  ".join(f"{what} {error:.1e}" for what, error in self.errors.items())
        precision = "" if self.dtype == "float32" else f"  ({self.dtype})"
        return f"{self.name}  {self.failure or figures}{precision}  {'ok' if self.ok else 'FAIL'}"


def compare(path: Path) -> Comparison:
    """Compare one reference file.

    Args:
        path: The safetensors file.

    Returns:
        The errors, or why the file's method cannot be rebuilt.

    Raises:
        UsageError: If the file is missing or not a reference file.
    """
    metadata, tensors = _read(path)
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # sums in one order, so that the same file gives the same errors on every machine
    try:
        return _compare(path.name, metadata, tensors)
    finally:
        torch.set_num_threads(threads)


def _compare(name: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Comparison:
    """Compare in float32, and again in float64 where that fails.

    Some references stand where rounding is magnified a thousandfold, at the edge of a threshold. There two right
    computations in float32 differ by more than the limit, and float64 tells whether it is ours that went astray.
    """
    single = _compare_in(torch.float32, name, metadata, tensors)
    if single.ok or single.failure:
        return single
    double = _compare_in(torch.float64, name, metadata, tensors)
    return double if double.ok else single


def _compare_in(
    dtype: torch.dtype, name: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Comparison:
    try:
        model, placed = _rebuild(metadata, tensors)
    except UsageError as error:
        return Comparison(name=name, errors={}, failure=str(error))
    model.to(dtype)
    errors = _forward_errors(model, tensors)
    if any(name.startswith("grad.") for name in tensors):
        errors["gradient"] = _gradient_error(model, metadata, tensors, placed)
    if "greedy" in tensors:
        errors["greedy"] = _greedy_error(model, tensors)
    return Comparison(name=name, errors=errors, dtype=str(dtype).removeprefix("torch."))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise UsageError(f"{path} is not a file: give reference files (*.safetensors)")
    try:
        with safe_open(path, "pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} is not a reference file: {error}") from error
    lacking = {"input_ids", "labels", "logits", "loss"} - tensors.keys()
    if lacking or "config" not in metadata:
        raise UsageError(f"{path} is not a reference file: it lacks {sorted(lacking) or 'its metadata'}")
    return metadata, tensors


def _rebuild(
    metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[PeftModel, dict[str, Destination]]:
    base = _base_model(metadata, _under("base.", tensors))
    weights = _under("adapter.", tensors)
    idle = idle_routers(weights)
    weights = {name: one for name, one in weights.items() if name not in idle}
    settings = _settings(metadata, base)
    torch.manual_seed(0)
    config = read_config(weights, settings)
    blocks = {one.block for one in destinations(weights, settings.head_size).values()}
    if len(blocks) < base.config.num_hidden_layers:
        config.layers_to_transform = sorted(blocks)
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    return model, load_weights(model, weights, settings.head_size)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}


def _base_model(metadata: Mapping[str, Any], weights: dict[str, Tensor]) -> PreTrainedModel:
    values = dict(metadata["config"])
    if metadata.get("head_dim") is not None:
        values.setdefault("head_dim", metadata["head_dim"])
    config = AutoConfig.for_model(metadata.get("architecture") or "llama", **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    wrong = model.load_state_dict(weights, strict=False)
    missing = [
        key for key in wrong.missing_keys if not (config.tie_word_embeddings and key == "lm_head.weight")
    ]
    if missing or wrong.unexpected_keys:
        raise UsageError(
            f"base weights do not fit: missing {missing[:3]}, unknown {wrong.unexpected_keys[:3]}"
        )
    return model


def _settings(metadata: Mapping[str, Any], base: PreTrainedModel) -> OfficialSettings:
    native = metadata.get("settings") or {}
    config = base.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    order = metadata.get("expert_order")
    names = (
        DEFAULT_ORDER
        if order is None
        else tuple(f"lora_{one}" if one.endswith("_proj") else one for one in order)
    )
    return OfficialSettings(
        alpha=float(metadata.get("lora_alpha") or native["lora_alpha"]),
        head_size=head_size,
        expert_order=names,
        max_threshold=metadata.get("max_threshold"),
        constant_threshold=metadata.get("constant_threshold"),
        keep=metadata.get("top_k"),
        instance_level="instance" in (metadata.get("method") or ""),
        balance=_balance_coefficient(metadata.get("grad_of") or ""),
    )


def _balance_coefficient(loss: str) -> float | None:
    """Read the coefficient out of "loss + 0.001 * load_balancing_loss"; None where there is none."""
    found = re.search(r"([0-9.e+-]+) \* load_balancing_loss", loss)
    return None if found is None else float(found[1])


def _forward_errors(model: PeftModel, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Run forward and backward in training mode, as the references were made; gradients stay on the parameters."""
    balance = torch.zeros(())

    def add_up(record: GateRecord) -> None:
        nonlocal balance
        balance = balance if record.balance_loss is None else balance + record.balance_loss

    for _, layer in mixture_layers(model):
        layer.observer = add_up
    model.train()
    output = model(input_ids=tensors["input_ids"], labels=tensors["labels"])
    output.loss.backward()
    errors = {
        "logits": _largest(output.logits.detach() - tensors["logits"]),
        "loss": _largest(output.loss.detach() - tensors["loss"]),
    }
    if "load_balancing_loss" in tensors:
        errors["balance loss"] = _largest(balance - tensors["load_balancing_loss"])
    return errors


def _gradient_error(
    model: PeftModel,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    placed: Mapping[str, Destination],
) -> float:
    parameters = parameters_by_place(model)
    gradients = _under("grad.", tensors)
    none = set(metadata.get("no_gradient") or [])
    worst = 0.0
    for name, one in placed.items():
        whole = parameters[one.block, one.parameter].grad
        ours = None if whole is None else one.view(whole)
        if name in none:
            worst = max(worst, 0.0 if ours is None else _largest(ours))
        elif name not in gradients or ours is None:
            return float("inf")
        else:
            theirs = one.transform(gradients[name])
            worst = max(
                worst, _largest(ours - theirs) / max(_largest(theirs), torch.finfo(theirs.dtype).tiny)
            )
    return worst


def _greedy_error(model: PeftModel, tensors: Mapping[str, Tensor]) -> float:
    """The number of tokens that differ in the greedy continuation with a cache."""
    greedy, ids = tensors["greedy"], tensors["input_ids"]
    width = min(greedy.shape[1], ids.shape[1])
    same = (greedy[:, :width] == ids[:, :width]).all(dim=0)
    prompt = int(same.long().cumprod(dim=0).sum())
    settings = GenerationConfig(
        max_new_tokens=greedy.shape[1] - prompt,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    model.eval()
    prompt_ids = ids[:, :prompt]
    ours = model.generate(
        input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids), generation_config=settings
    )
    return float((ours != greedy).sum())


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item()
