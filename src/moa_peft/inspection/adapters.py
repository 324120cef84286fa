"""Adapters as an inspection meets them: what is known of one, and a second one beside the first."""

import json
from collections import Counter
from typing import Any

from moa_peft.errors import UsageError, first_line
from moa_peft.evaluation.loading import AdapterFolder
from moa_peft.mixture.block_hooks import mixture_layers

SECOND = "compare"
"""The name of a second adapter in the model."""


def add_adapter(model: Any, folder: AdapterFolder, base_model: str | None) -> str:
    """Load a second adapter beside the first.

    Args:
        model: In PEFT's wrapper.
        folder: The second adapter's.
        base_model: What the first adapter was trained on; None where the user has named the base of both.

    Returns:
        Its name in the model.

    Raises:
        UsageError: If it belongs to another base model or cannot be loaded onto this one.
    """
    if base_model is not None and folder.base_model is not None and folder.base_model != base_model:
        raise UsageError(
            f"--compare {folder.name} was trained on {folder.base_model}, the first adapter runs on {base_model}: the "
            "two must have one base model; --model names it where it lies under several names"
        )
    from safetensors import SafetensorError

    try:
        model.load_adapter(str(folder.path), adapter_name=SECOND)
    except (SafetensorError, RuntimeError, ValueError, OSError, KeyError) as error:
        raise UsageError(
            f"--compare {folder.name} cannot be loaded beside the first adapter: {first_line(error)}"
        ) from error
    return SECOND


def about_adapter(model: Any, name: str, folder: AdapterFolder, base_model: str) -> dict[str, Any]:
    """Say what is known of an adapter.

    Args:
        model: With the adapter loaded.
        name: The adapter's name in the model.
        folder: Where it came from.
        base_model: What it runs on.

    Returns:
        ``adapter``, ``method``, ``base_model``, ``seed``; ``parameters``, rows of part, number in one block, number in
        all; ``config``, its `adapter_config.json`.
    """
    in_all: Counter[str] = Counter()
    in_one: dict[str, int] = {}
    for _, layer in mixture_layers(model):
        mixture = layer.mixtures().get(name)
        if mixture is None:
            continue
        parts = [
            ("router" if key == "" else f"router of {key}", one) for key, one in mixture.routers().items()
        ]
        for part, module in [*mixture.experts.items(), *parts]:
            number = sum(one.numel() for one in module.parameters())
            in_one.setdefault(part, number)
            in_all[part] += number
    config = json.loads((folder.path / "adapter_config.json").read_text(encoding="utf-8"))
    config.pop("base_model_name_or_path", None)  # a folder of this machine; ``base_model`` is its name
    return {
        "adapter": folder.name,
        "method": folder.method,
        "base_model": base_model,
        "seed": folder.seed,
        "trained_parameters": f"{sum(in_all.values()):,}",
        "parameters": [(part, in_one[part], in_all[part]) for part in in_all],
        "config": config,
    }
