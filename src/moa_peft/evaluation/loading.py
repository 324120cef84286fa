"""A model to evaluate or to talk to, from a base model and an adapter folder."""

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moa_peft.data.base_model import DEFAULT_MODEL, load_model, resolve_model
from moa_peft.errors import UsageError, expanded, first_line, unknown

if TYPE_CHECKING:
    from peft import PeftType
    from transformers import PreTrainedTokenizerBase

RECIPE_FILE = "moa_recipe.json"
"""What training leaves in an adapter's folder: the recipe, with the base model's name and the template."""

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes that a base model may be loaded in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFolder:
    """An adapter's folder, as far as it can be known without its weights."""

    name: str
    """As it was given: a folder, or a name on the hub."""

    path: Path
    """The folder on this machine."""

    base_model: str | None
    """The base model that it was trained on, as the recipe or else PEFT's config names it."""

    template: str | None
    """The template that it was trained with; None where there is no recipe."""

    method: str | None
    """The method that it was trained as; None where there is no recipe."""

    seed: int | None
    """The seed that it was trained with; None where there is no recipe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model ready to run."""

    model: Any
    """In evaluation mode, on the device it runs on; in PEFT's wrapper where there is an adapter."""

    tokenizer: "PreTrainedTokenizerBase"
    """The base model's, or the adapter's where its folder holds one."""

    base_model: str
    """The base model, as it was named."""

    adapter: AdapterFolder | None
    """The adapter, if there is one."""


def read_adapter(name: str) -> AdapterFolder:
    """Look at an adapter without loading it.

    Args:
        name: A folder with an `adapter_config.json`, or a name on the hub.

    Returns:
        What its files say.

    Raises:
        UsageError: If there is no such folder, it holds no adapter, or a file in it is not what it should be.
    """
    path = expanded(name)
    if not path.is_dir():
        path = _from_hub(name)
    config_file = path / "adapter_config.json"
    if not config_file.is_file():
        hint = (
            "it is a whole model: give it with --model"
            if (path / "config.json").is_file()
            else "it is no adapter"
        )
        checkpoints = sorted(path.glob("checkpoint-*/adapter_config.json"))
        if checkpoints:
            hint = f"a checkpoint in it does: --adapter {checkpoints[-1].parent}"
        raise UsageError(f"adapter folder {name} holds no adapter_config.json: {hint}")
    config = _read_json(config_file)
    recipe = _read_json(path / RECIPE_FILE) if (path / RECIPE_FILE).is_file() else {}
    base = recipe.get("model") or config.get("base_model_name_or_path")
    told = {"base model": base, "template": recipe.get("template"), "method": recipe.get("method")}
    for what, value in told.items():
        if value is not None and not isinstance(value, str):
            raise UsageError(f"adapter folder {name}: its {what} is {value!r}: it must be text")
    return AdapterFolder(
        name=name.rstrip("/") or name,
        path=path,
        base_model=base,
        template=recipe.get("template"),
        method=recipe.get("method"),
        seed=recipe.get("seed"),
    )


def load(
    base_model: str | None = None, adapter: AdapterFolder | None = None, *, dtype: str | None = None
) -> LoadedModel:
    """Load a base model, and an adapter onto it.

    Args:
        base_model: A folder, a name on the hub, or "smollm2"; None for the one that the adapter names, or else for
            "smollm2", the embedded default.
        adapter: From `read_adapter`; None for the bare model.
        dtype: One of `DTYPES` for the base model; None for float32 on a CPU and the model's own on a GPU. Adapters
            stay in float32.

    Returns:
        The model, on a GPU where there is one.

    Raises:
        UsageError: If a name stands for no model, or the adapter does not fit the base model or cannot be read.
    """
    import torch
    from transformers import AutoTokenizer

    if dtype is not None and dtype not in DTYPES:
        raise UsageError(unknown("dtype", dtype, DTYPES))
    name = base_model or (adapter.base_model if adapter is not None else None) or DEFAULT_MODEL
    path = resolve_model(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = "auto" if device == "cuda" else torch.float32
    holds_tokenizer = adapter is not None and (adapter.path / "tokenizer_config.json").is_file()
    try:
        tokenizer = AutoTokenizer.from_pretrained(adapter.path if adapter and holds_tokenizer else path)
    except (OSError, ValueError) as error:
        raise UsageError(f"the tokenizer of {name!r} cannot be loaded: {first_line(error)}") from error
    model = load_model(path, name, dtype=own if dtype is None else getattr(torch, dtype))
    if adapter is not None:
        model = _with_adapter(model, adapter)
    return LoadedModel(model=model.to(device).eval(), tokenizer=tokenizer, base_model=name, adapter=adapter)


def choose_template(given: str | None, adapter: AdapterFolder | None, otherwise: str) -> str:
    """The template asked for, or the one that the adapter was trained with, or another."""
    return given or (adapter.template if adapter is not None else None) or otherwise


def _with_adapter(model: Any, adapter: AdapterFolder) -> Any:
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from safetensors import SafetensorError

    other_base = "give the model that it was trained on with --model"
    doubtful = f"the adapter {adapter.name} cannot be loaded onto {adapter.base_model or 'this base model'}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            loaded = PeftModel.from_pretrained(model, str(adapter.path))
    except UserWarning as error:
        missing = re.findall(r"'([^']+)'", str(error))
        raise UsageError(
            f"{doubtful}: {len(missing)} of its weights are not in its file, as {missing[0]}; {other_base}"
        ) from error
    except SafetensorError as error:
        raise UsageError(f"{doubtful}: its weights are damaged or cut off: {first_line(error)}") from error
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        if isinstance(error, UsageError):
            raise
        if "size mismatch" in str(error):
            raise UsageError(
                f"{doubtful}: it was trained on a base of other sizes; give that one with --model"
            ) from error
        raise UsageError(f"{doubtful}: {first_line(error)}") from error
    if any(one.is_prompt_learning for one in loaded.peft_config.values()):
        raise UsageError(
            f"{doubtful}: PEFT's {loaded.peft_type} changes the length of the prompt, which likelihoods cannot follow; "
            "moa's own prompt expert (method prompt-tuning) can be evaluated"
        )
    # what has no place in the model is left out by PEFT without a word
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(cast("PeftType", loaded.peft_type), "")
    placed = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    lost = [
        one
        for one in load_peft_weights(str(adapter.path), device="cpu")
        if prefix in one and one not in placed
    ]
    if lost:
        raise UsageError(
            f"{doubtful}: {len(lost)} of its weights have no place in that model, as {lost[0]}; {other_base}"
        )
    return loaded


def _from_hub(name: str) -> Path:
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UsageError(f"adapter folder {name} does not exist: give a folder with an adapter_config.json")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UsageError(
            f"adapter {name} is no folder here, and the hub does not give it: {first_line(error)}"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{file} is not JSON: the adapter was not written whole; train or copy it again"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(
            f"{file} holds no JSON object: the adapter was not written whole; train or copy it again"
        )
    return content
