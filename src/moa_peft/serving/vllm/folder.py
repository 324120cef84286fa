"""What vLLM is given: an adapter that it can serve, its base model by reference, and the folder of `moa export`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import GenerationConfig

from moa_peft.data.base_loading import BaseSettings, base_config, empty_model, load_tokenizer
from moa_peft.data.tokenization import paper_chat_template
from moa_peft.errors import UsageError
from moa_peft.evaluation.generation import end_ids
from moa_peft.evaluation.loading import AdapterFolder, choose_base
from moa_peft.mixture.peft_config import MoAConfig
from moa_peft.official.adapter_folder import adapter_folder, check_apart, check_folder
from moa_peft.official.exporter import fitting_weights, read_mixture_config, read_weights
from moa_peft.serving.vllm.command import ARCHITECTURE

_ELSEWHERE = "serve it with transformers: moa serve --engine transformers, or moa chat"
_BASE_ARGUMENTS = ("revision", "dtype", "attn_implementation", "trust_remote_code")
"""How a base model may have been loaded; vLLM needs the revision alone, and chooses the rest by its own flags."""
_ROUTED_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Where configs of mixture-of-experts models say how many experts they have."""


def served_config(adapter: AdapterFolder) -> MoAConfig:
    """Read the config of an adapter, and check that vLLM can serve it.

    Raises:
        UsageError: If it is no mixture, or has a part that would come out wrong; the message names it.
    """
    config = read_mixture_config(adapter)
    routers = [config.router, *(one.copies()[1] for one in config.experts)]
    wrong: list[str] = []
    if any(one is not None and one.granularity == "instance" for one in routers):
        wrong.append(
            "its gates are those of whole prompts (granularity 'instance'), and vLLM reads a prompt in pieces"
        )
    if config.modules_to_save:
        wrong.append(f"it has trained {', '.join(config.modules_to_save)} as a whole (modules_to_save)")
    wrong += [
        f"expert {one.kind!r} reads the frozen weights in each call, and vLLM repacks them"
        for one in config.experts
        if one.reads_frozen_weights
    ]
    others = [key for key in read_weights(adapter) if ".moa.moa_mixture." not in key]
    if others and not config.modules_to_save:
        wrong.append(
            f"it holds {others[0]}, a weight of the base model, as after tokens were added to the vocabulary"
        )
    if wrong:
        raise UsageError(f"vLLM cannot serve {adapter.name}: {'; '.join(wrong)}. Instead {_ELSEWHERE}")
    return config


def served_base(
    adapter: AdapterFolder, model: str | None = None, init_kwargs: Mapping[str, Any] | None = None
) -> BaseSettings:
    """Find the base model of an adapter, as `choose_base` does, and check that vLLM loads the same one.

    Raises:
        UsageError: As `choose_base`; if the base is multimodal or a mixture of experts, or if the adapter was trained on
            one that was changed while it was loaded.
    """
    base = choose_base(model, adapter, init_kwargs)
    config = base_config(base)
    is_routed = any((getattr(config, name, 0) or 0) > 1 for name in _ROUTED_EXPERTS)
    is_multimodal = config.get_text_config() is not config
    if is_multimodal or is_routed:
        kind = "multimodal" if is_multimodal else "a mixture of experts"
        raise UsageError(
            f"the base model of {adapter.name} is {kind}, on which vLLM cannot serve a mixture of adapters: {_ELSEWHERE}"
        )
    others = {key: value for key, value in base.init_kwargs.items() if key not in _BASE_ARGUMENTS}
    if others:
        raise UsageError(
            f"vLLM cannot load the base model of {adapter.name} with {', '.join(others)}: {_ELSEWHERE}; or name a base model "
            "whose folder is the same without, or leave them out by --model-init-kwargs "
            f"'{json.dumps(dict.fromkeys(others))}'"
        )
    return base


def config_changes(base: BaseSettings) -> dict[str, Any]:
    """What the config that vLLM is given says beside the base model's own."""
    return {
        "architectures": [ARCHITECTURE],
        "moa_base": base.path,
        "moa_revision": base.init_kwargs.get("revision"),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmReport:
    """What an export for vLLM wrote."""

    folder: str
    base_model: str
    """The base model, where vLLM will look for it."""
    num_parameters: int
    """The adapter's."""


def export_vllm(
    adapter: AdapterFolder,
    out: Path,
    *,
    model: str | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> VllmReport:
    """Write a folder that ``vllm serve`` takes without a flag: adapter, tokenizer, chat template, and the base's config.

    Args:
        adapter: From `read_adapter`.
        out: The folder.
        model: The base model; None for the one that the adapter names. It is loaded from where it is now.
        init_kwargs: How it is loaded, as `choose_base` takes them.
        overwrite: Whether an adapter in the folder may be replaced.

    Raises:
        UsageError: If vLLM cannot serve the adapter, or it does not fit the base model.
    """
    check_folder(out, overwrite=overwrite)
    check_apart(out, adapter.path)
    config, base = served_config(adapter), served_base(adapter, model, init_kwargs)
    weights = fitting_weights(adapter, empty_model(base), config)
    tokenizer = load_tokenizer(base, adapter.tokenizer_path)
    generation = _generation_config(base)
    for name, ends in chat_ends(adapter, base).items():
        setattr(generation, name, ends)
    if adapter.template == "paper":
        tokenizer.chat_template = paper_chat_template(tokenizer)
    served = base_config(base)
    served.update(config_changes(base))
    with adapter_folder(out, overwrite=overwrite) as draft:
        for file in adapter.path.iterdir():
            if file.name in ("adapter_config.json", SAFETENSORS_WEIGHTS_NAME):
                (draft / file.name).write_bytes(file.read_bytes())
        tokenizer.save_pretrained(draft)
        served.save_pretrained(draft)
        # not save_pretrained, which refuses what it reads: a temperature without do_sample
        (draft / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
    return VllmReport(
        folder=str(out), base_model=base.path, num_parameters=sum(one.numel() for one in weights.values())
    )


def chat_ends(adapter: AdapterFolder, base: BaseSettings) -> dict[str, list[int]]:
    """The tokens that end an answer in a chat, as a setting; vLLM by itself takes those of the base and not the template's.

    Empty where no chat template is used.
    """
    tokenizer = load_tokenizer(base, adapter.tokenizer_path)
    if adapter.template == "paper" or not tokenizer.chat_template:
        return {}
    settings = SimpleNamespace(generation_config=_generation_config(base))
    return {"eos_token_id": sorted(end_ids(settings, tokenizer, "chat"))}


def _generation_config(base: BaseSettings) -> GenerationConfig:
    """The base's own, by which vLLM draws and ends an answer."""
    where = {key: value for key, value in base.file_kwargs().items() if key != "trust_remote_code"}
    try:
        return GenerationConfig.from_pretrained(base.path, **where)
    except OSError:  # it has none
        return GenerationConfig.from_model_config(base_config(base))
