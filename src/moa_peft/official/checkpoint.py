"""Reads an official checkpoint's files: the adapter's weights under the official names, whatever they lie in.

The native code leaves ``adapter.pth``; the transformers fork leaves safetensors, often shards of the whole model.
"""

import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moa_peft.errors import UsageError, first_line
from moa_peft.json_lines import read_object
from moa_peft.official.names import Layout, idle_routers

Value = TypeVar("Value")

_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
PICKLED = (".pth", ".pt", ".bin")
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
_PREFIXES = ("module.", "_orig_mod.", "base_model.model.")
_FORK_MODULES = re.compile(r"layers\.\d+\.(?:self_attn|mlp)\.")
_NATIVE_MODULES = re.compile(r"layers\.\d+\.(?:attention|feed_forward)\.")
_NATIVE_BASE = re.compile(
    r"(?:tok_embeddings|norm|output)\.weight|rope\.freqs"
    r"|layers\.\d+\.(?:attention\.w[qkvo]|feed_forward\.w[123]|attention_norm|ffn_norm)\.weight"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialCheckpoint:
    """An official checkpoint, read."""

    layout: Layout
    """Which code wrote it."""
    weights: Mapping[str, Tensor]
    """The adapter's weights by their official names, on the CPU, in the dtype that they are stored in."""
    base_weights: tuple[str, ...]
    """Names of the base model's weights that lay beside them and were left out."""
    idle_weights: tuple[str, ...]
    """Names of routers' weights that were left out: they gate nothing, for their block lacks such experts."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all weights, float32 where they differ."""
        dtypes = {one.dtype for one in self.weights.values()}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32


def read_checkpoint(path: Path, base_names: Collection[str]) -> OfficialCheckpoint:
    """Read an official checkpoint. Prefixes of wrappers are taken off the names; the modules tell the layout.

    Args:
        path: The native ``adapter.pth``, a safetensors file, or a folder that holds one of them (or several shards).
        base_names: Names of the base model's own weights in transformers; such weights are left out.

    Raises:
        UsageError: If there is no such checkpoint, it is damaged, or it holds no adapter of this family.
    """
    files = checkpoint_files(path)
    base: list[str] = []
    adapter: dict[str, Tensor] = {}
    for file in files:
        pickled = file.suffix in PICKLED
        found = _read_pickled(file, path) if pickled else _read_safetensors(file, base_names)
        for name, tensor in found.items():
            if tensor is None or _NATIVE_BASE.fullmatch(name) or name in base_names:
                base.append(name)
            elif name in adapter:
                raise UsageError(
                    f"{path} holds the weight {name!r} twice: give one checkpoint, not a folder of several"
                )
            else:
                adapter[name] = tensor
    if not adapter:
        left = f": all of its {len(base)} weights are those of a base model" if base else ""
        raise UsageError(
            f"{path} holds no adapter{left}; give the official adapter.pth, or the fork's safetensors"
        )
    layout, adapter = _normalised(adapter)
    idle = idle_routers(adapter)
    return OfficialCheckpoint(
        layout=layout,
        weights={name: one for name, one in adapter.items() if name not in idle},
        base_weights=tuple(base),
        idle_weights=tuple(sorted(idle)),
    )


def checkpoint_files(path: Path) -> list[Path]:
    """Find the files of a checkpoint: the file itself, or all shards of a folder.

    Raises:
        UsageError: If there is none, or it is not clear which it is.
    """
    if path.is_file():
        if path.suffix not in (*PICKLED, ".safetensors"):
            raise UsageError(
                f"checkpoint {path} is of an unknown kind: give an adapter.pth or a .safetensors file"
            )
        if _SHARD.fullmatch(path.name):
            raise UsageError(f"{path} is one of several shards: give their folder, {path.parent}")
        return [path]
    if not path.is_dir():
        raise UsageError(
            f"checkpoint {path} does not exist: give an official adapter.pth, or the fork's folder"
        )
    if (read_object(path / "adapter_config.json") or {}).get("peft_type") == "MOA":
        raise UsageError(
            f"{path} is an adapter of this package already: use it as it is, with moa evaluate --adapter {path}"
        )
    if (path / "adapter.pth").is_file():
        return [path / "adapter.pth"]
    shards = sorted(path.glob("*.safetensors"))
    _check_shards(path, [one.name for one in shards])
    pickled = sorted(
        one for one in path.iterdir() if one.suffix in PICKLED and one.name != "training_args.bin"
    )
    if shards or len(pickled) == 1:
        return shards or pickled
    seen = ", ".join(one.name for one in pickled) or "no .pth and no .safetensors file"
    raise UsageError(f"{path} holds {seen}: name the checkpoint's file itself")


def _check_shards(folder: Path, names: Collection[str]) -> None:
    """Refuse a folder that lacks shards, by the names that transformers gives them."""
    for name in names:
        if shard := _SHARD.fullmatch(name):
            start, total = shard[1], int(shard[2])
            wanted = [f"{start}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
            if lacking := [one for one in wanted if one not in names]:
                raise UsageError(f"{folder} lacks {', '.join(lacking)}: copy every shard of the checkpoint")


def _read_pickled(file: Path, path: Path) -> dict[str, Tensor]:
    """Read a file of `torch.save`, tensors alone: nothing in it is executed."""
    with file.open("rb") as opened:
        is_archive = opened.read(2) == b"PK"
    if is_archive and (not zipfile.is_zipfile(file) or zipfile.ZipFile(file).testzip() is not None):
        raise UsageError(f"{file} is damaged or cut off: copy it again")
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{file} holds more than tensors, or is damaged, and is not loaded: save its weights alone where they come "
            "from, as in torch.save(checkpoint['model'], 'adapter.pth')"
        ) from error
    except Exception as error:  # whatever torch's reader makes of bytes that are not its own
        raise UsageError(f"{file} is damaged or cut off, or no file of torch.save: copy it again") from error
    for _ in _WRAPPERS:  # not for ever: a mapping may hold itself
        inner = [
            key for key in _WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
        ]
        if inner:
            content = content[inner[0]]
    if not isinstance(content, Mapping) or not content:
        raise UsageError(f"{path} holds no weights by name: give the official adapter.pth")
    odd = [key for key, one in content.items() if not (isinstance(key, str) and isinstance(one, Tensor))]
    if odd:
        raise UsageError(f"{file} holds {odd[0]!r}, which is no weight: save its weights alone")
    return _bare({key: one.detach() for key, one in content.items()})


def _read_safetensors(file: Path, base_names: Collection[str]) -> dict[str, Tensor | None]:
    """Read the weights of a file but those of the base model, which are named only."""
    try:
        with safe_open(file, "pt") as content:
            stored = _bare({name: name for name in content.keys()})  # noqa: SIM118  # not a dict
            return {
                name: None if name in base_names else content.get_tensor(key) for name, key in stored.items()
            }
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} is damaged or cut off: {first_line(error)}") from error


def _bare(named: Mapping[str, Value]) -> dict[str, Value]:
    """Take the prefixes of wrappers off the names."""

    def bare(name: str) -> str:
        while prefix := next((one for one in _PREFIXES if name.startswith(one)), ""):
            name = name.removeprefix(prefix)
        return name

    found: dict[str, Value] = {}
    for name, one in named.items():
        if bare(name) in found:
            raise UsageError(
                f"the checkpoint holds {bare(name)!r} twice, once as {name!r}: save one of the two"
            )
        found[bare(name)] = one
    return found


def _normalised(weights: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
    """Tell the layout by the modules' names, not by a prefix, and give the names the prefix that belongs to it."""
    fork = [name for name in weights if _FORK_MODULES.search(name)]
    native = [name for name in weights if _NATIVE_MODULES.search(name)]
    if fork and native:
        raise UsageError(
            f"the checkpoint mixes two layouts, {native[0]!r} and {fork[0]!r}: it is of no official code known here"
        )
    is_fork = bool(fork) or (not native and any(name.startswith("model.layers.") for name in weights))
    prefix = "model." if is_fork else ""

    renamed = {re.sub(r"^(model\.)?(?=layers\.\d+\.)", prefix, name): one for name, one in weights.items()}
    return "fork" if is_fork else "native", renamed
