"""`moa export --format official`: an adapter folder becomes a checkpoint of the official code.

Names come from the config and the mixture's own parameters, values go through `Destination.inverse`, so that what was
imported comes out again with the same names and bits.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moa_peft.data.base_loading import empty_model
from moa_peft.errors import UsageError, unknown
from moa_peft.evaluation.loading import AdapterFolder, choose_base
from moa_peft.mixture.adapter_file import check_values
from moa_peft.mixture.config import CopiedExpertConfig, ExpertConfig, RouterConfig
from moa_peft.mixture.experts import LoraExpert, ParallelAdapterExpert, PromptExpert
from moa_peft.mixture.peft_config import MoAConfig
from moa_peft.official.adapter_folder import check_file, single_file
from moa_peft.official.checkpoint import PICKLED
from moa_peft.official.conversion import DEFAULT_ORDER, parameters_by_place
from moa_peft.official.importer import FORK_ALPHA, FORK_THRESHOLD, head_size, method_of
from moa_peft.official.names import KIND_GATES, Destination, Layout, destinations, kind_gates

FAMILIES: Mapping[Layout, tuple[str, ...]] = {"native": ("llama",), "fork": ("llama", "qwen3")}
"""The families of models that each official code knows."""

_OWN: Mapping[Layout, str] = {"native": ".pth", "fork": ".safetensors"}
"""How the name of each layout's file ends."""

_OTHERS: Mapping[Layout, tuple[str, ...]] = {"native": (".safetensors",), "fork": PICKLED}
"""How it must not: an import reads a file as what its name says."""

_KEY = re.compile(r"(?:.*\.)?(\d+)\.moa\.moa_mixture\.(.+)")
_ATTENTION = {"q_proj": "Q", "k_proj": "K", "v_proj": "V", "o_proj": "O"}
_MLP = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_ROUTED = (
    "router.logits.linear_weight", "router.logits.linear_bias", "router.logits.w2_weight", "router.logits.w2_bias",
)  # fmt: skip
"""Parameters of a block's router with a row for each gate."""
Weights = dict[tuple[int, str], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What an export to an official checkpoint did."""

    file: str
    """The file that was written."""
    layout: str
    """"native" or "fork"."""
    method: str
    """The method, by its preset's name."""
    num_weights: int
    """Weights in the file."""
    num_parameters: int
    """Their entries."""
    settings: dict[str, float | int | str]
    """What the official code has to be told, as the weights do not tell it: its arguments by name."""
    differences: tuple[str, ...]
    """What the official code computes otherwise than this package, a sentence each."""


def export_official(
    adapter: AdapterFolder,
    out: Path,
    *,
    layout: str | None = None,
    base: str | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write an adapter as a checkpoint of the official code. The base model's weights are not read.

    Args:
        adapter: From `read_adapter`.
        out: The file: ``adapter.pth`` for the native layout, safetensors for the fork's.
        layout: "native" or "fork"; None for the one whose router reads what this adapter's does.
        base: The base model; None for the one that the adapter names.
        init_kwargs: How it is loaded, as `choose_base` takes them.
        overwrite: Whether a file of that name may be replaced.

    Returns:
        What was done.

    Raises:
        UsageError: If the official code has no name for a part of the adapter, which the message names.
    """
    check_file(out, overwrite=overwrite)
    config = read_mixture_config(adapter)
    chosen = _layout(layout, config.parts().router)
    wrong = [*_problems(config), *(_fork_problems(config) if chosen == "fork" else [])]
    if wrong:
        raise UsageError(f"the official code has no such adapter: {'; '.join(wrong)}")
    if out.suffix in _OTHERS[chosen]:
        raise UsageError(
            f"out is {out}: the {chosen} layout, which fits this adapter's router, is another kind of file: give "
            f"{out.with_suffix(_OWN[chosen])}"
        )
    model = _base(base, adapter, init_kwargs, chosen)
    weights, size_of_heads = read_mixture_weights(adapter), head_size(model.config)
    _refuse_missing(adapter.name, weights, model, config)
    named = official_weights(config, weights, chosen, size_of_heads)
    with single_file(out, overwrite=overwrite) as draft:
        if chosen == "native":
            torch.save(named, draft)
        else:
            save_file(named, draft, metadata={"format": "pt"})
    return ExportReport(
        file=str(out),
        layout=chosen,
        method=method_of(config),
        num_weights=len(named),
        num_parameters=sum(one.numel() for one in named.values()),
        settings=_arguments(config),
        differences=tuple(_differences(config)),
    )


def read_mixture_config(adapter: AdapterFolder) -> MoAConfig:
    """Read the config of an adapter folder.

    Raises:
        UsageError: If the adapter is of another kind.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(adapter.path))
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{adapter.name} is an adapter of a kind that PEFT does not know here: {error}"
        ) from error
    if not isinstance(config, MoAConfig):
        raise UsageError(
            f"{adapter.name} is an adapter of PEFT's {config.peft_type}, no mixture: only mixtures are exported"
        )
    return config


def read_mixture_weights(adapter: AdapterFolder) -> Weights:
    """Read the weights of an adapter folder by block and by name in the block's mixture.

    Raises:
        UsageError: If they cannot be read, or some belong to no mixture.
    """
    file = adapter.path / "adapter_model.safetensors"
    if not file.is_file():
        raise UsageError(f"{adapter.name} holds no {file.name}: save the adapter with PEFT's save_pretrained")
    try:
        stored = load_file(file)
    except SafetensorError as error:
        raise UsageError(f"{file} is damaged or cut off: {error}") from error
    check_values(stored, adapter.name)
    weights: Weights = {}
    for key, tensor in stored.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise UsageError(f"{file} holds {key!r}, which belongs to no mixture: only mixtures are exported")
        weights[int(found[1]), found[2]] = tensor
    return weights


def official_weights(
    config: MoAConfig, weights: Weights, layout: Layout, size_of_heads: int
) -> dict[str, Tensor]:
    """Give a mixture's weights their official names and forms.

    Args:
        config: The mixture's config, of a kind that the official code has.
        weights: From `read_mixture_weights`.
        layout: Which official code's.
        size_of_heads: Size of a head of the base model.

    Returns:
        The weights by official name, each in memory of its own.

    Raises:
        UsageError: If a weight has no official name.
    """
    weights = {place: _in_official_order(place, one, config, weights) for place, one in weights.items()}
    names: dict[str, tuple[int, str]] = {}
    for block, parameter in sorted(weights):
        gates = kind_gates(_kinds_of_block(config, block, weights))
        names |= dict.fromkeys(_names(block, parameter, config, layout, gates), (block, parameter))
    placed: dict[str, Destination] = destinations(names, size_of_heads)
    made: dict[str, Tensor] = {}
    for name, place in names.items():
        one = placed[name]
        assert (one.block, one.parameter) == place, f"{name} leads to {one.parameter}, not to {place}"
        made[name] = one.inverse(one.view(weights[place])).clone(memory_format=torch.contiguous_format)
    return made | _idle_kind_gates(made)


def _idle_kind_gates(made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """UniPEFT's gates of kinds that a block lacks: the official code has them in each block, so they become zeros."""
    idle: dict[str, Tensor] = {}
    for name, one in made.items():
        block, _, rest = name.partition("_gate.")
        start, _, gate = block.rpartition(".")
        if f"{gate}_gate" in KIND_GATES:
            idle |= {f"{start}.{other}.{rest}": torch.zeros_like(one) for other in KIND_GATES}
    return {name: one for name, one in idle.items() if name not in made}


def _names(
    block: int, parameter: str, config: MoAConfig, layout: Layout, gates_of_kinds: Sequence[str]
) -> list[str]:
    """The official names of a parameter: one, or one for each copy of an expert, or for each kind's gate."""
    head, _, rest = parameter.partition(".")
    at_block = f"layers.{block}." if layout == "native" else f"model.layers.{block}."
    if head == "router":
        found = _router_names(rest, config, gates_of_kinds)
    else:
        expert, _, rest = rest.partition(".")
        own = _config_of(expert, block, config)
        found = None if own is None else _expert_names(head, expert, rest, own, layout)
    if found is None:
        raise UsageError(f"the official code has no name for {parameter} of block {block}")
    return [at_block + one for one in found]


def _router_names(rest: str, config: MoAConfig, gates_of_kinds: Sequence[str]) -> list[str] | None:
    router = config.parts().router
    part, _, leaf = rest.rpartition("_")
    if router is not None and router.gate_of == "kind" and part == "logits.linear":
        return [f"{gate}.{leaf}" for gate in gates_of_kinds]
    if part == "gate.threshold":
        return [f"adapter_threshold_fn.{leaf}"]
    middle = {"logits.linear": "", "logits.w1": ".w1", "logits.w2": ".w2", "logits.w3": ".w3"}.get(part)
    return None if middle is None else [f"adapter_type_router{middle}.{leaf}"]


def _expert_names(head: str, expert: str, rest: str, own: ExpertConfig, layout: Layout) -> list[str] | None:
    attention, mlp = ("attention", "feed_forward") if layout == "native" else ("self_attn", "mlp")
    if isinstance(own, PromptExpert):
        found = {
            "vectors": ["prompt.weight"],
            "head_scale": ["prompt_gate"],
            "logits.linear_weight": ["prompt_router.weight"],
            "logits.linear_bias": ["prompt_router.bias"],
        }.get(rest)
        return None if found is None else [f"{attention}.{one}" for one in found]
    if isinstance(own, ParallelAdapterExpert):
        found = _parallel_adapter_names(head, rest, own)
        return None if found is None else [f"p_adapter.{one}" for one in found]
    if isinstance(own, LoraExpert):
        target = expert.removeprefix("lora_")
        letter = _MLP.get(target, "")
        module = f"{attention}.lora_{_ATTENTION[target]}" if target in _ATTENTION else (
            f"{mlp}.lora_{letter.upper() if layout == 'native' else letter}"
        )  # fmt: skip
        found = _lora_names(head, rest, own)
        return None if found is None else [f"{module}.{one}" for one in found]
    return None


def _parallel_adapter_names(head: str, rest: str, own: ParallelAdapterExpert) -> list[str] | None:
    if head == "copy_routers":
        return (
            [f"router.{rest.removeprefix('logits.linear_')}"] if rest.startswith("logits.linear_") else None
        )
    part, _, leaf = rest.partition("_")
    if part == "up" and own.num_experts > 1:
        return [f"up_proj_l.{copy}.{leaf}" for copy in range(own.num_experts)]
    return [f"{part}_proj.{leaf}"]


def _lora_names(head: str, rest: str, own: LoraExpert) -> list[str] | None:
    gate = None if own.router is None else own.router.gate
    if head == "copy_routers":
        part, _, leaf = rest.rpartition("_")
        linear = "router.topkroute_linear" if gate == "top-k" else "router"
        module = {
            "logits.linear": linear,
            "gate.noise": "router.noise_linear",
            "gate.threshold": "threshold_fn",
        }
        return [f"{module[part]}.{leaf}"] if part in module else None
    copies = range(own.num_experts)
    if gate is None or (rest == "A" and own.shared):
        return [f"lora_{rest}.weight"]
    if gate == "softmax":
        return [f"lora_{rest}_l.{copy}.weight" for copy in copies]
    return [f"experts.{copy}.lora_{rest}.weight" for copy in copies]


def _in_official_order(place: tuple[int, str], weight: Tensor, config: MoAConfig, weights: Weights) -> Tensor:
    """Bring the rows of a block's router, a row for each gate, into the order of the official code's columns."""
    block, parameter = place
    router = config.parts().router
    if router is None or parameter not in _ROUTED:
        return weight
    names = _experts_of_block(config, block, weights)
    if router.gate_of == "kind":
        names = _kinds_of_block(config, block, weights)
        order = [one for one in KIND_GATES.values() if one in names]
    else:
        order = [one for one in DEFAULT_ORDER if one in names]
    return weight[[names.index(one) for one in order]]


def _experts_of_block(config: MoAConfig, block: int, weights: Weights) -> list[str]:
    """The experts of a block in the order of their gates."""
    there = {parameter.split(".")[1] for index, parameter in weights if index == block and "." in parameter}
    return [name for name, own in _experts(config) if name in there and _is_in(own, block)]


def _kinds_of_block(config: MoAConfig, block: int, weights: Weights) -> list[str]:
    """The kinds of experts of a block in the order of their gates."""
    there = _experts_of_block(config, block, weights)
    return list(dict.fromkeys(own.kind for name, own in _experts(config) if name in there))


def _experts(config: MoAConfig) -> list[tuple[str, ExpertConfig]]:
    return [
        (own.kind if site in ("mlp", "attention") else f"{own.kind}_{site}", own)
        for own in config.parts().experts
        for site in own.site_names()
    ]


def _is_in(own: ExpertConfig, block: int) -> bool:
    return own.layers is None or block in own.layers


def _config_of(expert: str, block: int, config: MoAConfig) -> ExpertConfig | None:
    return next((own for name, own in _experts(config) if name == expert and _is_in(own, block)), None)


def _layout(given: str | None, router: RouterConfig | None) -> Layout:
    """The layout asked for, or the one that fits; they differ in what the router of a block reads."""
    reads: dict[str, str] = {"native": "block", "fork": "projection"}
    if given is not None and given not in reads:
        raise UsageError(unknown("layout", given, get_args(Layout)))
    if router is None:
        return cast("Layout", given or "native")
    fitting = next(name for name, what in reads.items() if what == router.router_input)
    if given is not None and given != fitting:
        raise UsageError(
            f"--layout {given}: the routers of that code read router_input {reads[given]!r}, this adapter's read "
            f"{router.router_input!r}, so its gates would be others: leave --layout out, for {fitting!r}"
        )
    return cast("Layout", fitting)


def _problems(config: MoAConfig) -> list[str]:
    """What neither official code has a name for."""
    parts = config.parts()
    wrong: list[str] = []
    for own in parts.experts:
        if type(own) not in (LoraExpert, PromptExpert, ParallelAdapterExpert):
            wrong.append(f"the expert kind {own.kind!r} is not in it (it has lora, prompt, parallel_adapter)")
        elif isinstance(own, CopiedExpertConfig):
            wrong += _copy_problems(own)
    kinds = sorted({own.kind for own in parts.experts})
    names = [name for name, _ in _experts(config)]
    twice = sorted({one for one in names if names.count(one) > 1})
    if twice:
        wrong.append(f"it has one of each expert, {', '.join(twice)} is there twice")
    loras = [own for own in parts.experts if isinstance(own, LoraExpert)]
    for field in ("alpha", "rank", "num_experts", "shared", "layers", "router"):
        if any(getattr(own, field) != getattr(loras[0], field) for own in loras):
            given = " and ".join(dict.fromkeys(str(getattr(own, field)) for own in loras))
            wrong.append(f"its LoRA have one {field} for all targets, these have {given}")
    if any(own.rslora for own in loras):
        wrong.append(
            "its LoRA are scaled by alpha / rank, rslora is true: give alpha / rank as large instead"
        )
    if parts.router is None and len(kinds) > 1:
        wrong.append(f"experts of several kinds ({', '.join(kinds)}) need a router of the block in it")
    if config.modules_to_save:
        wrong.append(f"modules_to_save {config.modules_to_save} is not in it")
    return wrong + ([] if parts.router is None else _router_problems(parts.router, kinds))


def _router_problems(router: RouterConfig, kinds: Sequence[str]) -> list[str]:
    wrong: list[str] = []
    if router.gate != "sigmoid":
        wrong.append(f"the gate {router.gate!r} of a block's router is not in it (it has sigmoid)")
    if not router.bias:
        wrong.append("its block routers have biases, this one has none")
    if router.gate_of == "kind" and set(kinds) != set(KIND_GATES.values()):
        wrong.append(
            f"its gates of kinds are {', '.join(KIND_GATES.values())}, this adapter has {', '.join(kinds)}"
        )
    if router.gate_of == "kind" and (
        router.kind != "linear" or router.granularity != "instance" or router.threshold
    ):
        wrong.append("its gates of kinds are linear ones of a whole instance, without a threshold")
    return wrong


def _copy_problems(own: CopiedExpertConfig) -> list[str]:
    """What no official code has of an expert's copies."""
    router, name = own.router, own.kind
    if router is None:
        return []
    gates = ("softmax", "top-k", "threshold") if isinstance(own, LoraExpert) else ("softmax",)
    if own.num_experts == 1:
        return [f"a router over a single copy of {name} is not in it"]
    if router.gate not in gates or router.kind != "linear":
        return [f"a {router.kind} router with gate {router.gate!r} over copies of {name} is not in it"]
    wrong: list[str] = []
    has_bias = not (isinstance(own, LoraExpert) and router.gate == "softmax")
    if router.bias is not has_bias:
        there = "a bias" if has_bias else "no bias"
        wrong.append(f"the routers over copies of {name} with gate {router.gate!r} have {there} in it")
    shared = getattr(own, "shared", None)
    if isinstance(own, ParallelAdapterExpert) and not shared:
        wrong.append("several copies of the parallel adapter that share nothing crash it")
    if isinstance(own, LoraExpert) and shared and router.gate != "softmax":
        wrong.append(f"LoRA copies that share A have the gate 'softmax' in it, these have {router.gate!r}")
    return wrong


def _fork_problems(config: MoAConfig) -> list[str]:
    """What the transformers fork has no name for, though the native code has."""
    router = config.parts().router
    wrong: list[str] = []
    if any(own.copies()[0] > 1 for own in config.parts().experts):
        wrong.append("the fork's experts have no copies")
    if router is not None and router.gate_of == "kind":
        wrong.append("the fork has no gates of kinds")
    if router is not None and router.granularity == "instance":
        wrong.append("the fork has no gates of a whole instance")
    if router is not None and router.threshold is not None and router.threshold.constant is not None:
        wrong.append("the fork has no constant threshold")
    return wrong


def _base(
    name: str | None, adapter: AdapterFolder, init_kwargs: Mapping[str, Any] | None, layout: Layout
) -> Any:
    """The base model without its weights, which must be of a family that the official code knows."""
    if name is None and adapter.base_model is None:
        raise UsageError("the adapter names no base model: give --model")
    base = choose_base(name, adapter, init_kwargs)
    model = empty_model(base)
    family = model.config.get_text_config().model_type
    if family not in FAMILIES[layout]:
        raise UsageError(
            f"the base model {base.name!r} is of the family {family}: the official code in the {layout} layout knows "
            f"{', '.join(FAMILIES[layout])}"
        )
    return model


def _refuse_missing(name: str, weights: Weights, model: Any, config: MoAConfig) -> None:
    """Check that the adapter holds every weight that its config makes on the base model."""
    mixture = get_peft_model(model, copy.deepcopy(config))
    assert isinstance(mixture, PeftModel)
    missing = sorted(set(parameters_by_place(mixture)) - set(weights))
    if missing:
        block, parameter = missing[0]
        raise UsageError(
            f"{name} lacks {len(missing)} of its weights, as {parameter} of block {block}: it was not written whole, or "
            "was trained on another base model (give that with --model)"
        )


def _arguments(config: MoAConfig) -> dict[str, float | int | str]:
    """The official code's own arguments for this adapter, as far as they are not the model's."""
    found: dict[str, float | int | str] = {}
    for own in config.parts().experts:
        if isinstance(own, LoraExpert):
            found |= {"lora_rank": own.rank, "lora_alpha": own.alpha}
            if own.num_experts > 1:
                found["expert_num"] = own.num_experts
            if own.router is not None and own.router.keep is not None:
                found["top_k"] = own.router.keep
        elif isinstance(own, PromptExpert):
            found["prompt_len"] = own.length
        elif isinstance(own, ParallelAdapterExpert):
            found["p_adapter_size"] = own.size
    router = config.parts().router
    if router is not None and router.gate_of == "expert":
        found["swi_x"] = (router.hidden_per_expert or 4) if router.kind == "swiglu" else 0
    threshold = None if router is None else router.threshold
    if threshold is not None and threshold.maximum is not None:
        found["max_threshold"] = threshold.maximum
    elif threshold is not None and threshold.constant is not None:
        found["const_threshold"] = threshold.constant
    return found


def _differences(config: MoAConfig) -> list[str]:
    """Where the official code with these weights computes something else than this package does."""
    router = config.parts().router
    if router is None:
        return []
    found: list[str] = []
    if router.threshold is not None and router.threshold.at_least_one:
        found.append(
            "a token whose scores all lie below the threshold has no expert there; here it keeps the best"
        )
    if router.granularity == "instance" and router.pooling == "prompt":
        found.append(
            "gates of an instance are means over padding and answer as well there; here over the prompt"
        )
    if router.gate_of == "kind" and not router.dead_adapter_gate:
        found.append("the parallel adapter takes the prompt's gate there; here its own")
    return found


def fork_constants(settings: Mapping[str, float | int | str]) -> list[str]:
    """Say which settings differ from what the fork hard-codes, so that its source would have to be changed.

    Args:
        settings: An `ExportReport`'s.

    Returns:
        A sentence for each.
    """
    hard_coded = {
        "lora_rank": 8, "lora_alpha": FORK_ALPHA, "p_adapter_size": 16, "prompt_len": 10, "swi_x": 4,
        "max_threshold": FORK_THRESHOLD,
    }  # fmt: skip
    return [
        f"{name} is {settings[name]}, the fork hard-codes {value:g}: change it in its source"
        for name, value in hard_coded.items()
        if name in settings and settings[name] != value
    ]
