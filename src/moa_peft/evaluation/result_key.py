"""What identifies a result: the model by name and by its weights, and everything else that decides it."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moa_peft.data.row import Row, rows_md5
from moa_peft.data.templates import render_completion, render_prompt
from moa_peft.data.tokenization import completion_ids, end_token_id, prompt_ids
from moa_peft.evaluation.code_execution import Limits
from moa_peft.evaluation.generation import end_ids
from moa_peft.evaluation.loading import LoadedModel
from moa_peft.evaluation.options import EvaluationOptions
from moa_peft.evaluation.questions import Task
from moa_peft.evaluation.text_choices import text_form, text_questions
from moa_peft.provenance import provenance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_SAMPLED = 4096
"""Entries of a large tensor that go into its fingerprint one by one, beside the sum over all of its bits."""


METHOD_VERSION = 5
"""Goes up when scoring, generation or extraction changes, so that no old example is taken for a new one."""


_ELSEWHERE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Settings of a model that say where it came from, or what its weights say themselves."""


_TOKENISER_ROWS = 16
"""Rows whose tokens stand for the tokenizer in a key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """Which model, by name and by weights."""

    base_model: str
    """The base model, as it was named."""
    base_settings: Mapping[str, Any]
    """How it was loaded; empty for a model that was not loaded here."""
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
    base_settings: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    method: str | None = None,
    seed: int | None = None,
) -> ModelIdentity:
    """Identify a model as it would run now: with its active adapter, or bare where that is switched off.

    Args:
        model: A model of transformers, bare or in PEFT's wrapper.
        base_model: Name of the base model; None for the one its config holds.
        base_settings: How it was loaded, of a `LoadedModel`.
        adapter: The adapter's folder, if it has one.
        method: The adapter's method; None for the kind PEFT knows it by.
        seed: Seed that the adapter was trained with, if known.

    Returns:
        The identity. It changes with any change of a weight, and with nothing else.
    """
    configs = dict(getattr(model, "peft_config", None) or {})
    base = fingerprint(_base_tensors(model, configs))
    name = base_model or str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    shared: dict[str, Any] = {
        "base_model": name,
        "base_settings": dict(base_settings or {}),
        "base_fingerprint": base,
    }
    active = _active_adapters(model) if configs else []
    if not active:
        return ModelIdentity(**shared, adapter=None, adapter_fingerprint=None, method="frozen", seed=None)
    return ModelIdentity(
        **shared,
        adapter=adapter,
        adapter_fingerprint=_adapter_fingerprint(model, active),
        method=method or "+".join(str(configs[one].peft_type.value).lower() for one in active),
        seed=seed,
    )


def identify_loaded(loaded: LoadedModel) -> ModelIdentity:
    """Identify a model that was loaded here, under the names that it was given."""
    adapter = loaded.adapter
    return identify(
        loaded.model,
        base_model=loaded.base_model,
        base_settings=loaded.base_settings,
        adapter=None if adapter is None else adapter.name,
        method=None if adapter is None else adapter.method,
        seed=None if adapter is None else adapter.seed,
    )


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash named tensors, in any order: name, dtype, shape, the sum over all bits, and a sample of the entries.

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
    """The base model's own parameters, and what it saves beside them, where some quantised layers keep weights, by their names without PEFT.

    Tied parameters count once, so that a model is what it was in rows from before the buffers counted.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    saved = model.state_dict(keep_vars=True).items()
    beside = [(name, tensor) for name, tensor in saved if name not in parameters]
    found: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *beside]:
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
    return repr(sorted((key, _stable_text(value)) for key, value in entries.items()))


def _stable_text(value: Any) -> str:
    """Text of a setting that does not depend on the order of a set or on an object's address."""
    if isinstance(value, set | frozenset):
        return repr(sorted(map(_stable_text, value)))
    if isinstance(value, dict):
        return repr(sorted((str(key), _stable_text(one)) for key, one in value.items()))
    if isinstance(value, list | tuple):
        return repr([_stable_text(one) for one in value])
    return str(getattr(value, "value", value))


def evaluation_key(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    options: EvaluationOptions,
    identity: ModelIdentity,
) -> str:
    """Hash everything that decides what a model makes of the examples of a task, to 64 hexadecimal digits.

    The size of the batch and the device are left out, they change rounding alone; so is the extraction rule, as every
    example is read by all of them. The model itself gives its settings beside its weights.
    """
    mode = options.mode_for(task)
    rows = [one.row for one in task.questions]
    tokens: list[Any]
    if mode == "text":
        asked = [one.tokens(tokenizer) for one in text_questions(task)[:_TOKENISER_ROWS]]
        tokens = [[one.prompt, one.completions] for one in asked]
    else:
        few, template = rows[:_TOKENISER_ROWS], options.template
        prompts = [prompt_ids(render_prompt(row, template, tokenizer), tokenizer, template) for row in few]
        tokens = [
            [ids, completion_ids(render_completion(row), tokenizer)]
            for ids, row in zip(prompts, few, strict=True)
        ]
    decisive = {
        "version": METHOD_VERSION,
        "rows": rows_md5(rows),
        "mode": mode,
        "template": None if mode == "text" else options.template,
        "chat_template": tokenizer.chat_template if options.template == "chat" and mode != "text" else None,
        "max_new_tokens": options.tokens_for(task) if mode == "generation" else None,
        "base": identity.base_fingerprint,
        "adapter": identity.adapter_fingerprint,
        "settings": {name: value for name, value in model.config.to_dict().items() if name not in _ELSEWHERE},
        "tokens": tokens,
        "tokenizer": _tokenizer_md5(tokenizer),
        "ends": [
            end_token_id(tokenizer, "paper" if mode == "text" else options.template),
            *sorted(end_ids(model, tokenizer)),
        ],
    }
    if task.runs_code:
        decisive["tests"] = [one.code and dataclasses.asdict(one.code) for one in task.questions]
        decisive["limits"] = dataclasses.asdict(Limits())
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()


def _tokenizer_md5(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """MD5 of all that a fast tokenizer is; None for a slow one, of which the tokens of some rows must do."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else hashlib.md5(backend.to_str().encode()).hexdigest()


def describe(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    options: EvaluationOptions,
    identity: ModelIdentity,
) -> dict[str, Any]:
    """Everything needed to repeat an evaluation, as fields of `ResultRow`."""
    form = Row(instruction="{instruction}", input="", output="", answer="")
    mode = options.mode_for(task)
    return {
        "task": task.name,
        "source": task.source,
        "split": task.split,
        "limit": task.limit,
        "data_md5": rows_md5([one.row for one in task.questions]),
        "file_md5": task.file_md5,
        "max_new_tokens": options.tokens_for(task) if mode == "generation" else None,
        "template": "none" if mode == "text" else options.template,
        "prompt_form": text_form(task).prompt
        if mode == "text"
        else render_prompt(form, options.template, tokenizer),
        "batch_size": options.batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        **dataclasses.asdict(identity),
        **provenance(),
    }
