"""Reads reference files: what the official code computed on a tiny random model, in one safetensors file each.

A file holds ``base.*``, ``adapter.*`` and ``grad.*`` weights, ``input_ids``, ``labels``, ``logits``, ``loss``, sometimes
``load_balancing_loss`` and ``greedy``; its metadata holds every setting as JSON.

Sizes: B rows, T tokens of a row, V words.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moa_peft.errors import UsageError, first_line
from moa_peft.official.conversion import DEFAULT_ORDER, OfficialSettings
from moa_peft.official.names import idle_routers

ARCHITECTURES = ("llama", "qwen3")
"""The models that reference files are about."""

_ORDER = {name.removeprefix("lora_"): name for name in DEFAULT_ORDER}
_LOSS = re.compile(r"\s*loss\s*(?:\+\s*(?:([0-9.eE+-]+)\s*\*\s*)?load_balancing_loss\s*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A reference file, read and found sound."""

    path: Path
    architecture: str
    """One of `ARCHITECTURES`."""
    config: Mapping[str, Any]
    """Arguments of the model's config in transformers."""
    settings: OfficialSettings
    """What the adapter's weights do not tell."""
    coefficient: float
    """Of the balance loss in the loss whose gradients are here; 0 where it is not part of it."""
    base: Mapping[str, Tensor]
    """The frozen weights by transformers' names."""
    adapter: Mapping[str, Tensor]
    """The adapter's weights by official names, without those that gate nothing."""
    gradients: Mapping[str, Tensor]
    """By official names, zeros for a weight that has none; empty where the file compares none."""
    tensors: Mapping[str, Tensor]
    """The file's other tensors."""

    @property
    def head_size(self) -> int:
        """Size of a head of the model."""
        return self.config["head_dim"]

    @property
    def prompt(self) -> int:
        """Tokens of each row that the greedy continuation starts from."""
        greedy, ids = self.tensors["greedy"], self.tensors["input_ids"]
        width = min(greedy.shape[1], ids.shape[1])
        same = (greedy[:, :width] == ids[:, :width]).all(dim=0)
        return int(same.long().cumprod(dim=0).sum())


def read_reference(path: Path) -> Reference:
    """Read a reference file (*.safetensors).

    Raises:
        UsageError: If it is no reference file, or compares less than it says; each reason is named.
    """
    metadata, tensors = read_file(path)
    wrong = list(_problems(metadata, tensors))
    if wrong:
        raise UsageError("; ".join(wrong))
    adapter = under("adapter.", tensors)
    idle, given = idle_routers(adapter), under("grad.", tensors)
    return Reference(
        path=path,
        architecture=metadata.get("architecture") or ARCHITECTURES[0],
        # no token ends a text, for the reference goes on whatever the token
        config={**metadata["config"], "head_dim": _head_size(metadata), "eos_token_id": None},
        settings=_settings(metadata, adapter),
        coefficient=_coefficient(metadata.get("grad_of") or "loss") or 0.0,
        base=under("base.", tensors),
        adapter={name: one for name, one in adapter.items() if name not in idle},
        gradients={name: given.get(name, torch.zeros_like(one)) for name, one in adapter.items()}
        if given
        else {},
        tensors={name: one for name, one in tensors.items() if not name.startswith(_WEIGHTS)},
    )


_WEIGHTS = ("base.", "adapter.", "grad.")


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a reference file's settings and tensors as they are.

    Raises:
        UsageError: If it cannot be read, or lacks what every reference file has.
    """
    if not path.is_file():
        raise UsageError("it is not a file: give reference files (*.safetensors)")
    try:
        with safe_open(path, "pt") as file:
            stored = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"it is no reference file, or it is damaged or cut off: {first_line(error)}"
        ) from error
    lacking = {"input_ids", "labels", "logits", "loss"} - tensors.keys()
    if lacking or "config" not in stored:
        raise UsageError(f"it is no reference file: it lacks {sorted(lacking) or 'its metadata'}")
    metadata: dict[str, Any] = {}
    for key, value in stored.items():
        try:
            metadata[key] = json.loads(value)
        except json.JSONDecodeError as error:
            raise UsageError(f"its metadata {key!r} is {value[:40]!r}, which is no JSON") from error
    return metadata, tensors


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}


def _problems(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What would let a file agree that compares less than it says; anything else malformed ends as an error of its own."""
    adapter, gradients = under("adapter.", tensors), under("grad.", tensors)
    if not adapter:
        yield "it has no weights 'adapter.*'"
    if (architecture := metadata.get("architecture") or ARCHITECTURES[0]) not in ARCHITECTURES:
        yield f"'architecture' is {architecture!r}: it has to be {' or '.join(ARCHITECTURES)}"
    if _coefficient(metadata.get("grad_of") or "loss") is None:
        yield f"'grad_of' is {metadata['grad_of']!r}: it has to be 'loss', or 'loss + NUMBER * load_balancing_loss'"
    if metadata.get("max_threshold") is not None and metadata.get("constant_threshold") is not None:
        yield "it has both 'max_threshold' and 'constant_threshold': one of them has to be null"
    if _has_top_k(adapter) and metadata.get("top_k") is None:
        yield "its top-k routers need the metadata 'top_k', a whole number above 0"
    yield from _gradient_problems(adapter, gradients, metadata.get("no_gradient") or [])
    yield from _output_problems(metadata["config"]["vocab_size"], tensors)


def _output_problems(words: int, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Shapes that could be broadcast, and a greedy text that continues nothing."""
    ids = tensors["input_ids"]
    shapes = {"labels": ids.shape, "logits": (*ids.shape, words)}
    for name, shape in shapes.items():
        if tensors[name].shape != torch.Size(shape):
            yield f"{name!r} is {list(tensors[name].shape)}: it has to be {list(shape)}"
    for name in sorted({"loss", "load_balancing_loss"} & tensors.keys()):
        if tensors[name].numel() != 1:
            yield f"{name!r} has to be one number"
    if "greedy" in tensors:
        yield from _greedy_problems(tensors["greedy"], ids)


def _gradient_problems(
    adapter: Mapping[str, Tensor], gradients: Mapping[str, Tensor], without: Sequence[str]
) -> Iterator[str]:
    for name in without:
        if name not in adapter:
            yield f"'no_gradient' names {name!r}, which is no weight in it"
    for name, one in gradients.items():
        if name not in adapter:
            yield f"'grad.{name}' is the gradient of no weight in it"
        elif one.shape != adapter[name].shape:
            yield f"'grad.{name}' is {list(one.shape)}, its weight {list(adapter[name].shape)}"
    lacking = adapter.keys() - gradients.keys() - set(without) - idle_routers(adapter) if gradients else set()
    for name in sorted(lacking):
        yield f"'grad.{name}' is missing, and 'no_gradient' does not name it"


def _greedy_problems(greedy: Tensor, ids: Tensor) -> Iterator[str]:
    if greedy.dim() != 2 or greedy.shape[0] != ids.shape[0]:
        yield f"'greedy' is {list(greedy.shape)}: it has to be [{ids.shape[0]}, T]"
    elif not torch.equal(greedy[:, :1], ids[:, :1]):
        yield "'greedy' has to begin with tokens of 'input_ids', and does not"
    elif greedy.shape[1] <= ids.shape[1] and torch.equal(greedy, ids[:, : greedy.shape[1]]):
        yield "'greedy' continues nothing: it has only tokens of 'input_ids'"


def _has_top_k(adapter: Mapping[str, Tensor]) -> bool:
    return any(".router.topkroute_linear." in name for name in adapter)


def _head_size(metadata: Mapping[str, Any]) -> int:
    config = metadata["config"]
    stated = metadata.get("head_dim") or config.get("head_dim")
    return stated or config["hidden_size"] // config["num_attention_heads"]


def _alpha(metadata: Mapping[str, Any]) -> float | None:
    return metadata.get("lora_alpha") or (metadata.get("settings") or {}).get("lora_alpha")


def _settings(metadata: Mapping[str, Any], adapter: Mapping[str, Tensor]) -> OfficialSettings:
    order = metadata.get("expert_order")
    return OfficialSettings(
        alpha=_alpha(metadata),
        expert_order=DEFAULT_ORDER if order is None else tuple(_ORDER[one] for one in order),
        max_threshold=metadata.get("max_threshold"),
        constant_threshold=metadata.get("constant_threshold"),
        keep=metadata.get("top_k") if _has_top_k(adapter) else None,
        instance_level="instance" in (metadata.get("method") or ""),
        # computed and compared always; where it is not part of the loss, its gradient is left out in training
        balance=_coefficient(metadata.get("grad_of") or "loss") or 1.0,
    )


def _coefficient(loss: str) -> float | None:
    """Read the balance loss's coefficient out of "loss + 0.001 * load_balancing_loss"; None if it is not of that form."""
    found = _LOSS.fullmatch(loss)
    if found is None or "load_balancing_loss" not in loss:
        return None if found is None else 0.0
    try:
        value = float(found[1] or 1.0)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None
