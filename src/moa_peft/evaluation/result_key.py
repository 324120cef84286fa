"""Which model gave a result: names, and fingerprints of the weights themselves."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SAMPLED = 4096
"""Entries of a large tensor that go into its fingerprint one by one, beside the sum over all of its bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """Which model, by name and by weights."""

    base_model: str
    """The base model, as it was named."""

    base_fingerprint: str
    """Hash of its weights."""

    adapter: str | None
    """The adapter's folder; None for the bare model or an adapter in memory only."""

    adapter_fingerprint: str | None
    """Hash of the adapter's settings and weights; None for the bare model."""

    method: str
    """The adapter's method; "frozen" for the bare model."""

    seed: int | None
    """Seed that the adapter was trained with, where it is known."""


def identify(
    model: Any,
    *,
    base_model: str | None = None,
    adapter: str | None = None,
    method: str | None = None,
    seed: int | None = None,
) -> ModelIdentity:
    """Identify a model as it would run now: with its active adapter, or bare where that is switched off.

    Args:
        model: A model of transformers, bare or in PEFT's wrapper.
        base_model: Name of the base model; None for the one its config holds.
        adapter: The adapter's folder, if it has one.
        method: The adapter's method; None for the kind PEFT knows it by.
        seed: Seed that the adapter was trained with, if known.

    Returns:
        The identity. It changes with any change of a weight, and with nothing else.
    """
    configs = dict(getattr(model, "peft_config", None) or {})
    base = fingerprint(_base_tensors(model, configs))
    name = base_model or str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    active = _active_adapters(model) if configs else []
    if not active:
        return ModelIdentity(
            base_model=name,
            base_fingerprint=base,
            adapter=None,
            adapter_fingerprint=None,
            method="frozen",
            seed=None,
        )
    return ModelIdentity(
        base_model=name,
        base_fingerprint=base,
        adapter=adapter,
        adapter_fingerprint=_adapter_fingerprint(model, active),
        method=method or "+".join(str(configs[one].peft_type.value).lower() for one in active),
        seed=seed,
    )


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash named tensors: name, dtype, shape, the sum over all bits, and a sample of the entries.

    Args:
        tensors: Names and tensors, in any order.

    Returns:
        16 hexadecimal digits. Any change of a single entry shows in the sum; an exchange of two in the sample, where
        it holds one of them. The device does not matter.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda one: one[0]):
        bits = _bits(tensor)
        sample = bits[:: max(1, bits.numel() // _SAMPLED)].cpu()
        total = int(bits.sum(dtype=torch.int64))
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total}\n".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _bits(tensor: Tensor) -> Tensor:
    """The entries as whole numbers, flat."""
    flat = tensor.detach().contiguous().reshape(-1)
    size = flat.element_size()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(size, torch.uint8)
    return flat.view(whole) if flat.numel() else flat.to(torch.uint8)


def _base_tensors(model: Any, configs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The base model's own parameters, under the names that they have without PEFT."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.named_parameters():
        parts = name.split(".")
        if configs and any(one in configs for one in parts):
            continue
        if configs and parts[:2] == ["base_model", "model"]:
            parts = parts[2:]
        bare = [one for one in parts if not configs or one not in ("base_layer", "original_module")]
        found[".".join(bare)] = tensor
    return list(found.items())


def _active_adapters(model: Any) -> list[str]:
    """The adapters at work; none where they are switched off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [one for one in model.modules() if isinstance(one, BaseTunerLayer)]
    if layers and all(one.disable_adapters for one in layers):
        return []
    return list(model.active_adapters)


def _adapter_fingerprint(model: Any, active: list[str]) -> str:
    from peft import get_peft_model_state_dict

    digest = hashlib.sha256()
    for name in active:
        weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        digest.update(fingerprint(weights.items()).encode())
        digest.update(_settings(model.peft_config[name]).encode())
    return digest.hexdigest()[:16]


def _settings(config: Any) -> str:
    """What an adapter's config says about its arithmetic, as text; where it came from is left out."""
    elsewhere = ("base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping")
    entries = {key: value for key, value in config.to_dict().items() if key not in elsewhere}
    return repr(sorted((key, _plain(value)) for key, value in entries.items()))


def _plain(value: Any) -> str:
    """Text of a setting that does not depend on the order of a set or on an object's address."""
    if isinstance(value, set | frozenset):
        return repr(sorted(map(_plain, value)))
    if isinstance(value, dict):
        return repr(sorted((str(key), _plain(one)) for key, one in value.items()))
    if isinstance(value, list | tuple):
        return repr([_plain(one) for one in value])
    return str(getattr(value, "value", value))
