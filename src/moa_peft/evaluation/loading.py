"""A model to evaluate or to talk to, from a base model and an adapter folder."""

import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from moa_peft.data.base_loading import (
    PLACE,
    BaseSettings,
    find_base,
    load_base,
    load_tokenizer,
    told_init_kwargs,
)
from moa_peft.data.base_model import DEFAULT_MODEL
from moa_peft.data.templates import Template
from moa_peft.errors import UsageError, expanded, first_line, unknown
from moa_peft.json_lines import read_object
from moa_peft.mixture.adapter_file import check_values, split_frozen
from moa_peft.provenance import RECIPE_FILE

if TYPE_CHECKING:
    from peft import PeftType
    from transformers import PreTrainedTokenizerBase

_OTHER_BASE = "give the model that it was trained on with --model"

_OF_THE_CALL = (
    "device_map", "max_memory", "offload_folder", "offload_buffers", "offload_state_dict", "low_cpu_mem_usage", "cache_dir",
    "local_files_only", "force_download", "proxies", "use_cache",
)  # fmt: skip
"""Arguments of `from_pretrained` that say nothing of the model, only where and how it was run."""

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

    base_places: tuple[Path, ...]
    """Folders that this name may stand for: where training found it, seen from here, seen from the adapter's folder."""

    init_kwargs: Mapping[str, Any]
    """How the base model was loaded for training: arguments of `from_pretrained`."""

    template: str | None
    """The template that it was trained with; None where there is no recipe."""

    method: str | None
    """The method that it was trained as; None where there is no recipe."""

    seed: int | None
    """The seed that it was trained with; None where there is no recipe."""

    @property
    def tokenizer_path(self) -> Path | None:
        """Where its own tokenizer lies; None where it has that of its base model."""
        return self.path if (self.path / "tokenizer_config.json").is_file() else None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model ready to run."""

    model: Any
    """In evaluation mode, on the device it runs on; in PEFT's wrapper where there is an adapter."""

    tokenizer: "PreTrainedTokenizerBase"
    """The base model's, or the adapter's where its folder holds one."""

    base_model: str
    """The base model, as it was named."""

    base_settings: Mapping[str, Any]
    """How it was loaded, for the rows of results."""

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
    recipe_file = (run_of(path) or path) / RECIPE_FILE
    recipe = _read_json(recipe_file) if recipe_file.is_file() else {}
    found, revision = config.get("base_model_name_or_path"), config.get("revision")
    base = recipe.get("model") or found
    told = {"base model": base, "template": recipe.get("template"), "method": recipe.get("method")}
    told |= {"base_model_name_or_path": found, "revision": revision, "peft_type": config.get("peft_type")}
    for what, value in told.items():
        if value is not None and not isinstance(value, str):
            raise UsageError(f"adapter folder {name}: its {what} is {value!r}: it must be text")
    init_kwargs = {"revision": revision, **(told_init_kwargs(recipe) if recipe else {})}
    if init_kwargs.get("trust_remote_code") is False:
        del init_kwargs["trust_remote_code"]  # the default
    return AdapterFolder(
        name=name.rstrip("/") or name,
        path=path,
        base_model=base,
        base_places=() if base is None else _places(base, found, path),
        init_kwargs={
            key: value for key, value in init_kwargs.items() if value is not None and key not in _OF_THE_CALL
        },
        template=recipe.get("template"),
        method=recipe.get("method"),
        seed=recipe.get("seed"),
    )


def run_of(adapter: Path) -> Path | None:
    """The folder of the run that an adapter's folder is a checkpoint of; None if it is none."""
    run = adapter.absolute().parent
    return run if adapter.name.startswith("checkpoint-") and (run / RECIPE_FILE).is_file() else None


def _places(base: str, found: str | None, adapter: Path) -> tuple[Path, ...]:
    """Folders that a base model's name may stand for: where training found it if that fits, from here, from the adapter."""
    named, recorded = expanded(base), Path(found or "")
    tail = tuple(one for one in named.parts if one not in (".", ".."))
    fits = recorded.is_absolute() and (not tail or recorded.parts[-len(tail) :] == tail)
    return tuple(dict.fromkeys((*([recorded] if fits else []), named, adapter / named)))


def choose_base(
    model: str | None,
    adapter: AdapterFolder | None,
    init_kwargs: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> BaseSettings:
    """Find the base model that was asked for, or the one that the adapter was trained on, as it was loaded there.

    Args:
        model: A folder, a name on the hub, or "smollm2"; None for the one that the adapter names, or else "smollm2".
        adapter: From `read_adapter`; None for the bare model.
        init_kwargs: Arguments of `from_pretrained`. They override what the adapter's folder says; None removes one.
        dtype: One of `DTYPES`; None for the one of the training, without one float32 on a CPU and the checkpoint's own
            on a GPU.

    Raises:
        UsageError: If a name stands for no model, dtype is given twice or unknown, or the training had an argument that
            a folder may not decide, such as leave to run the base model's own code.
    """
    given = dict(init_kwargs or {})
    if dtype is not None:
        if dtype not in DTYPES:
            raise UsageError(unknown("dtype", dtype, DTYPES))
        if "dtype" in given:
            raise UsageError(f"dtype is given twice, as {dtype} and in model_init_kwargs: leave one out")
        given["dtype"] = dtype
    told = {} if adapter is None else dict(adapter.init_kwargs)
    places = None if adapter is None else adapter.base_places
    if model is not None:  # a revision is one of the model that the adapter names
        told, places = {key: value for key, value in told.items() if key not in PLACE}, None
    asked = {key: value for key, value in told.items() if key not in given and not _may_be_told(key, value)}
    if adapter is not None and asked:
        raise UsageError(
            f"{adapter.name} was trained with {', '.join(asked)} for its base model, which no adapter's folder decides "
            f"here: add --model-init-kwargs '{json.dumps(asked)}' to do the same (a value null leaves it out)"
        )
    name = model or (adapter.base_model if adapter is not None else None) or DEFAULT_MODEL
    return find_base(name, {"dtype": default_dtype(), **told, **given}, places)


def default_dtype() -> str:
    """The dtype of a base model of which nothing is known: float32 on a CPU, the checkpoint's own on a GPU."""
    import torch

    return "auto" if torch.cuda.is_available() else "float32"


def _may_be_told(name: str, value: object) -> bool:
    """Whether an adapter's folder, which somebody else may have written, may decide an argument of `from_pretrained`."""
    if name == "quantization_config":
        return isinstance(value, Mapping)
    if name == "attn_implementation":  # with a slash it names code on the hub
        return isinstance(value, str) and "/" not in value
    return name in (*PLACE, "dtype") and isinstance(value, str)


def load(
    base_model: str | None = None,
    adapter: AdapterFolder | None = None,
    *,
    dtype: str | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load a base model, and an adapter onto it.

    Args:
        base_model: As `choose_base` takes it, like the arguments below.
        adapter: From `read_adapter`; None for the bare model.
        dtype: Of the base model. Adapters stay in float32.
        init_kwargs: Arguments of `from_pretrained`.

    Returns:
        The model, on a GPU where there is one.

    Raises:
        UsageError: As `choose_base`; if the adapter does not fit the base model, cannot be read, or holds weights of
            the frozen model.
    """
    import torch

    base = choose_base(base_model, adapter, init_kwargs, dtype)
    tokenizer = load_tokenizer(base, adapter and adapter.tokenizer_path)
    model = load_base(base, tokenizer)
    if adapter is not None:
        model = add_adapter(model, adapter)
    if not getattr(model, "hf_device_map", None):
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        base_model=base.name,
        base_settings=base.recorded(),
        adapter=adapter,
    )


def choose_template(given: str | None, adapter: AdapterFolder | None, otherwise: str) -> str:
    """The template asked for, or the one that the adapter was trained with, or another."""
    return given or (adapter.template if adapter is not None else None) or otherwise


def conversation_template(given: str | None, loaded: LoadedModel) -> Template:
    """The template of conversations: the one asked for, that of the training, or else the model's chat template.

    Raises:
        UsageError: If it is none, or is "chat" and the tokenizer has no chat template.
    """
    has_template = bool(loaded.tokenizer.chat_template)
    chosen = choose_template(given, loaded.adapter, "chat" if has_template else "paper")
    if chosen not in get_args(Template):
        raise UsageError(f"template is {chosen!r}: give 'chat' or 'paper'")
    if chosen == "chat" and not has_template:
        raise UsageError("template 'chat': the tokenizer of this model has no chat template: use 'paper'")
    return cast("Template", chosen)


def add_adapter(model: Any, adapter: AdapterFolder, name: str = "default") -> Any:
    """Load an adapter onto a base model, or beside the adapter that is there.

    Args:
        model: Of transformers, or in PEFT's wrapper.
        adapter: From `read_adapter`.
        name: What the adapter is called in the model.

    Returns:
        The model in PEFT's wrapper.

    Raises:
        UsageError: If the adapter does not fit the model or cannot be read, or its file holds weights of the frozen model
            that are not its own.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    doubtful = f"the adapter {adapter.name} cannot be loaded onto {adapter.base_model or 'this base model'}"
    with _explained(doubtful):
        weights = _weights(adapter, model)
        if isinstance(model, PeftModel):
            loaded = model
            loaded.load_adapter(str(adapter.path), adapter_name=name)
        else:
            loaded = PeftModel.from_pretrained(model, str(adapter.path), adapter_name=name)
    config = loaded.peft_config[name]
    if config.is_prompt_learning:
        raise UsageError(
            f"{doubtful}: PEFT's {config.peft_type} changes the length of the prompt, which likelihoods cannot follow; "
            "moa's own prompt expert (method prompt-tuning) can be evaluated"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise UsageError(
            f"{doubtful}: it is an activated LoRA, at work from its invocation tokens on, which calls on a cache do not see"
        )
    # what has no place in the model is left out by PEFT without a word
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(cast("PeftType", config.peft_type), "")
    placed = get_peft_model_state_dict(loaded, adapter_name=name, save_embedding_layers=False)
    lost = [one for one in weights if prefix in one and one not in placed]
    if lost:
        raise UsageError(
            f"{doubtful}: {len(lost)} of its weights have no place in that model, as {lost[0]}; {_OTHER_BASE}"
        )
    return loaded


def _weights(adapter: AdapterFolder, model: Any) -> dict[str, Any]:
    """Read the weights of an adapter, and see that they are numbers and leave the frozen model as it is."""
    from peft import PeftConfig, load_peft_weights
    from torch import Tensor

    weights: dict[str, Tensor] = load_peft_weights(str(adapter.path), device="cpu")
    check_values(
        {name: one for name, one in weights.items() if one.is_floating_point()}, f"adapter {adapter.name}"
    )
    split_frozen(model, weights, PeftConfig.from_pretrained(str(adapter.path)), f"adapter {adapter.name}")
    return weights


@contextmanager
def _explained(doubtful: str) -> Iterator[None]:
    """Say in one line what PEFT, torch and safetensors say of an adapter that cannot be loaded."""
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            yield
    except UsageError:
        raise
    except UserWarning as error:
        missing = re.findall(r"'([^']+)'", str(error))
        raise UsageError(
            f"{doubtful}: {len(missing)} of its weights are not in its file, as {missing[0]}; {_OTHER_BASE}"
        ) from error
    except SafetensorError as error:
        raise UsageError(f"{doubtful}: its weights are damaged or cut off: {first_line(error)}") from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise UsageError(
            f"{doubtful}: its adapter_model.bin is a pickle of more than tensors, or damaged, and is not read: ask for "
            "an adapter_model.safetensors"
        ) from error
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        if "size mismatch" in str(error):
            raise UsageError(
                f"{doubtful}: it was trained on a base of other sizes; give that one with --model"
            ) from error
        raise UsageError(f"{doubtful}: {first_line(error)}") from error


def _from_hub(name: str) -> Path:
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UsageError(f"adapter folder {name} does not exist: give a folder with an adapter_config.json")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UsageError(
            f"adapter {name} is no folder here, and the hub does not give it ({first_line(error)}): give the folder that "
            "`moa train --output_dir` wrote"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    content = read_object(file)
    if content is None:
        raise UsageError(
            f"{file} holds no JSON object that can be read: the adapter was not written whole; train or copy it again"
        )
    return content
