"""How a base model is loaded: everything that was told of it in one value, and one way from there to a model."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_peft.data.base_model import resolve_model
from moa_peft.data.cache import read_manifest, sha256_of
from moa_peft.data.progress import say
from moa_peft.errors import UsageError, first_line
from moa_peft.provenance import has_fast_bfloat16

if TYPE_CHECKING:
    import torch

PLACE = ("revision", "subfolder", "variant", "gguf_file")
"""Arguments of `from_pretrained` that belong to one name: another base model has others."""

_FILES = (
    "revision",
    "subfolder",
    "gguf_file",
    "code_revision",
    "cache_dir",
    "local_files_only",
    "trust_remote_code",
)
"""Arguments that a tokenizer and a config take as well."""

_REFUSED = {
    "token": "it would be written into recipes and results: log in with `hf auth login`, or set HF_TOKEN",
    "torch_dtype": "its name in transformers is dtype now",
}
"""Arguments that have no meaning here, and what to do instead."""

_FAILURES = (OSError, ValueError, RuntimeError, ImportError, TypeError, AttributeError, KeyError)
"""What transformers raises for arguments and files that it cannot use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseSettings:
    """A base model, and how it is loaded."""

    name: str
    """As it was named: a folder, a name on the hub, or "smollm2"."""

    path: str
    """Where it was found: a folder, or the name on the hub."""

    init_kwargs: Mapping[str, Any]
    """Arguments of `from_pretrained`: revision, dtype, quantization_config, attn_implementation, trust_remote_code ..."""

    looked_in: tuple[str, ...] = ()
    """For a name on the hub: the folders of that name that are not there."""

    def file_kwargs(self) -> dict[str, Any]:
        """The arguments for a config or a tokenizer; trust_remote_code is False unless given, so that transformers never asks."""
        return {"trust_remote_code": False} | {k: v for k, v in self.init_kwargs.items() if k in _FILES}

    def place(self) -> list[str]:
        """What tells this base model from others: its path, and what else its name needs, as a revision."""
        return [self.path, *(f"{key} {self.init_kwargs[key]}" for key in PLACE if key in self.init_kwargs)]

    def recorded(self) -> dict[str, Any]:
        """What rows of results say of how it was loaded: the arguments, and the commit of one from the hub."""
        commit = {} if Path(self.path).is_dir() else {"commit": _hub_commit(self)}
        return json.loads(json.dumps({**self.init_kwargs, **commit}, default=str))


def find_base(
    name: str, init_kwargs: Mapping[str, Any] | None = None, places: Sequence[Path] | None = None
) -> BaseSettings:
    """Find a base model.

    Args:
        name: A folder, a name on the hub, or "smollm2".
        init_kwargs: Arguments of `from_pretrained`; those that are None are left out.
        places: Folders that the name may stand for, best first; None for the name itself.

    Raises:
        UsageError: As `resolve_model`; if an argument cannot be kept or is no argument of a call.
    """
    given = {key: value for key, value in (init_kwargs or {}).items() if value is not None}
    wrong = [f"model_init_kwargs.{key}: {why}" for key, why in _REFUSED.items() if key in given]
    if wrong:
        raise UsageError("; ".join(wrong))
    path = resolve_model(name, places, str(_config_file(given)))
    looked_in = () if Path(path).is_dir() else tuple(str(one.absolute()) for one in places or [Path(name)])
    return BaseSettings(name=name, path=path, init_kwargs=given, looked_in=looked_in)


def told_init_kwargs(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of how its base model is loaded.

    Args:
        recipe: Its flat mapping, from a run or from an adapter's folder.

    Returns:
        Arguments of `from_pretrained`; "auto", the checkpoint's own dtype, where neither dtype nor bf16 is given.

    Raises:
        UsageError: If model_init_kwargs is no mapping.
    """
    given = recipe.get("model_init_kwargs") or {}
    if not isinstance(given, Mapping):
        raise UsageError(f'model_init_kwargs is {given!r}: give a mapping, as in \'{{"revision": "v1"}}\'')
    given = {"dtype" if key == "torch_dtype" else key: value for key, value in given.items()}
    trust = {"trust_remote_code": True} if recipe.get("trust_remote_code") is True else {}
    return {"dtype": "bfloat16" if recipe.get("bf16") is True else "auto", **trust, **given}


def load_tokenizer(base: BaseSettings, folder: Path | None = None) -> Any:
    """Load a base model's tokenizer, or the one in an adapter's folder.

    Raises:
        UsageError: If it cannot be read, or has code that may not run.
    """
    from transformers import AutoTokenizer

    given = base.file_kwargs()
    if folder is not None:
        given = {"trust_remote_code": given["trust_remote_code"]}
    try:
        return AutoTokenizer.from_pretrained(base.path if folder is None else folder, **given)
    except _FAILURES as error:
        raise _unreadable(f"the tokenizer of {folder or base.name}", base, error) from error


def load_base(base: BaseSettings, tokenizer: Any = None) -> Any:
    """Load a base model, whole, as its settings say. Everything that needs one comes here.

    Args:
        base: From `find_base`.
        tokenizer: What it will be used with. If that has more tokens than the model has embeddings, as after tokens
            were added to it, the model gets rows for them: the same ones each time.

    Returns:
        The model.

    Raises:
        UsageError: If it cannot be read, has code that may not run, or lacks weights, which would be random.
    """
    from safetensors import SafetensorError

    what = f"the model {base.name!r}"
    given = {"trust_remote_code": False, **base.init_kwargs}
    try:
        loaded: Any = auto_class(base_config(base)).from_pretrained(
            base.path, output_loading_info=True, **given
        )
    except (*_FAILURES, SafetensorError) as error:
        raise _unreadable(what, base, error) from error
    model, found = loaded
    lacking = sorted(found["missing_keys"])
    if lacking:
        raise UsageError(
            f"{what} lacks {len(lacking)} of its weights, as {lacking[0]}, and they would be random: give a folder or "
            "name that holds all of them"
        )
    if tokenizer is not None and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        _add_rows(model, len(tokenizer))
    _say_if_emulated(model.dtype)
    return model


@cache
def _say_if_emulated(dtype: "torch.dtype") -> None:
    """Say once that a model will be slow: without instructions for bfloat16, a processor converts every number of a product."""
    import torch

    if (
        dtype != torch.bfloat16
        or torch.accelerator.is_available()
        or not torch.backends.mkldnn.is_available()
    ):
        return
    if not has_fast_bfloat16():
        say(
            "this processor has no instructions for bfloat16, in which the model's weights are: training takes about 20 "
            "times as long as in float32, generation twice; give --model_init_kwargs.dtype float32 to train, --dtype float32 "
            "elsewhere"
        )


def _add_rows(model: Any, rows: int) -> None:
    """Lengthen the embeddings. transformers draws the new rows: from one seed, so that they are the same in every call."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(rows)


def base_config(base: BaseSettings) -> Any:
    """Read a base model's config.

    Raises:
        UsageError: If there is none, it is of no known family, or has code that may not run.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base.path, **base.file_kwargs())
    except _FAILURES as error:
        raise _unreadable(f"the model {base.name!r}", base, error) from error


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model of a config: the one for pictures where there is none for text alone."""
    import transformers

    kind = type(config)
    reads_pictures = kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if reads_pictures and kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def empty_model(base: BaseSettings) -> Any:
    """Build a causal language model of a base model's sizes, on the meta device, without weights.

    Raises:
        UsageError: If its config cannot be read, or is of no causal language model.
    """
    import torch

    config, trust = base_config(base), base.file_kwargs()["trust_remote_code"]
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=trust)
    except ValueError as error:
        what = f"the model {base.name!r} is no causal language model of transformers"
        raise UsageError(f"{what}: {first_line(error)}") from error


def model_fingerprint(base: BaseSettings) -> str:
    """Identify the weights of a base model, for the rows of results.

    Returns:
        SHA-256 of the weight file of a folder (of all their SHA-256 in the order of their names, if there are
        several); the commit of a name on the hub that has been loaded before, "unknown" for one that has not.

    Raises:
        UsageError: If the folder holds no weight file.
    """
    folder = Path(base.path)
    if not folder.is_dir():
        return _hub_commit(base)
    manifest = read_manifest(folder)
    if manifest is not None and "model.safetensors" in manifest["files"]:
        return manifest["files"]["model.safetensors"]["sha256"]
    folder /= base.init_kwargs.get("subfolder", "")
    kinds = (base.init_kwargs.get("gguf_file", "*.safetensors"), "pytorch_model*.bin")
    files = next((found for kind in kinds if (found := sorted(folder.glob(kind)))), [])
    if not files:
        raise UsageError(f"model folder {folder} holds no .safetensors and no pytorch_model*.bin file")
    sums = [sha256_of(file) for file in files]
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()


def _hub_commit(base: BaseSettings) -> str:
    """The commit under which the hub's cache holds a model's config, or "unknown"."""
    from huggingface_hub import try_to_load_from_cache

    where = {name: base.init_kwargs[name] for name in ("revision", "cache_dir") if name in base.init_kwargs}
    file = _config_file(base.init_kwargs)
    found = try_to_load_from_cache(base.path, file.as_posix(), **where)
    return Path(found).parents[len(file.parts) - 1].name if isinstance(found, str) else "unknown"


def _config_file(init_kwargs: Mapping[str, Any]) -> Path:
    """The file of a model's folder that says what the model is."""
    return Path(init_kwargs.get("subfolder", ""), init_kwargs.get("gguf_file", "config.json"))


def _unreadable(what: str, base: BaseSettings, error: Exception) -> UsageError:
    if isinstance(error, UsageError):
        return error
    if "trust_remote_code" in str(error):
        return UsageError(
            f"{what} cannot be loaded: it has code of its own: read that, and if you trust it add --model-init-kwargs "
            "'{\"trust_remote_code\": true}'"
        )
    nowhere = f"; there is no folder {' or '.join(base.looked_in)} either" if base.looked_in else ""
    return UsageError(f"{what} cannot be loaded: {first_line(error) or type(error).__name__}{nowhere}")


def longest_input(model: Any) -> int | None:
    """The most tokens that a model reads; None for one that does not say, or has no such limit."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most if most is not None and most > 0 else None
