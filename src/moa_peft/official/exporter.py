"""`moa export --format official`: an adapter folder becomes a checkpoint of the official code.

Names come from the config and the mixture's own parameters, values go through `Destination.inverse`, so that what was
imported comes out again with the same names and bits.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moa_peft.data.base_loading import empty_model
from moa_peft.errors import UsageError, unknown
from moa_peft.evaluation.loading import AdapterFolder, choose_base
from moa_peft.json_lines import written_whole
from moa_peft.mixture.adapter_file import check_fit, check_values
from moa_peft.mixture.config import ExpertConfig, RouterConfig
from moa_peft.mixture.peft_config import MoAConfig
from moa_peft.official.adapter_folder import check_apart, check_file
from moa_peft.official.checkpoint import PICKLED
from moa_peft.official.conversion import DEFAULT_ORDER, head_size
from moa_peft.official.names import KIND_GATES, Layout, destinations, official_names
from moa_peft.official.official_code import arguments, differences, method_of, named_experts, problems
from moa_peft.training.output_folder import disk_errors_named

FAMILIES: Mapping[Layout, tuple[str, ...]] = {"native": ("llama",), "fork": ("llama", "qwen3")}
"""The families of models that each official code knows."""

_ENDINGS: Mapping[Layout, tuple[str, ...]] = {"native": PICKLED, "fork": (".safetensors",)}
"""How the name of a layout's file may end: an import reads a file as what its name says."""

_KEY = re.compile(r"(?:.*\.)?(\d+)\.moa\.moa_mixture\.(\w+\..+)")
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
    num_parameters: int
    """Entries of all weights."""
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

    Raises:
        UsageError: If the official code has no name for a part of the adapter, which the message names.
    """
    check_file(out, overwrite=overwrite)
    check_apart(out, adapter.path)
    config = read_mixture_config(adapter)
    chosen = _layout(layout, config.router)
    if wrong := list(problems(config, chosen)):
        raise UsageError(f"the official code has no such adapter: {'; '.join(wrong)}")
    if out.suffix not in _ENDINGS[chosen]:
        own = out.with_suffix(".pth" if chosen == "native" else ".safetensors")
        raise UsageError(
            f"out is {out}: the {chosen} layout, which fits this adapter's router, is a {own.suffix} file: give {own}"
        )
    model = _base(base, adapter, init_kwargs, chosen)
    weights: Weights = {}
    for key, tensor in fitting_weights(adapter, model, config).items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise UsageError(
                f"{adapter.name} holds {key!r}, which belongs to no mixture: only mixtures are exported"
            )
        weights[int(found[1]), found[2]] = tensor
    named = official_weights(config, weights, chosen, head_size(model.config))
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as draft, disk_errors_named(out.parent):
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
        settings=arguments(config),
        differences=tuple(differences(config)),
    )


def read_mixture_config(adapter: AdapterFolder) -> MoAConfig:
    """Read the config of an adapter folder.

    Raises:
        UsageError: If the adapter is of another kind.
    """
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


def read_weights(adapter: AdapterFolder) -> dict[str, Tensor]:
    """Read the weights of an adapter folder by the names of its file.

    Raises:
        UsageError: If they cannot be read.
    """
    file = adapter.path / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise UsageError(f"{adapter.name} holds no {file.name}: save the adapter with PEFT's save_pretrained")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UsageError(f"{file} is damaged or cut off: {error}") from error


def fitting_weights(adapter: AdapterFolder, model: Any, config: MoAConfig) -> dict[str, Tensor]:
    """Read the weights of an adapter folder, and check that they are what its config makes on a base model.

    Args:
        adapter: From `read_adapter`.
        model: The base model, on the meta device; it is changed.
        config: The adapter's.

    Raises:
        UsageError: If they cannot be read, are not finite, or are missing, unknown or of other sizes.
    """
    weights = read_weights(adapter)
    check_values(weights, adapter.name)
    hollow = get_peft_model(model, copy.deepcopy(config))
    check_fit(get_peft_model_state_dict(hollow, save_embedding_layers=False), weights, adapter.name)
    return weights


def official_weights(
    config: MoAConfig, weights: Weights, layout: Layout, size_of_heads: int
) -> dict[str, Tensor]:
    """Give a mixture's weights their official names and forms.

    Args:
        config: The mixture's config, of a kind that the official code has.
        weights: The mixture's, by block and by name in the block's mixture.
        layout: Which official code's.
        size_of_heads: Size of a head of the base model.

    Returns:
        The weights by official name, each in memory of its own.

    Raises:
        UsageError: If a weight has no official name.
    """
    router = config.router
    experts = {block: _experts_of_block(config, block, weights) for block, _ in weights}
    names: dict[str, tuple[int, str]] = {}
    for place in sorted(weights):
        block, parameter = place
        part, expert = parameter.split(".")[:2]
        own = experts[block].get(expert)
        form = router.gate_of if part == "router" and router is not None else _form(own, parameter)
        copies, kinds = own.copies()[0] if own else 1, _kinds(experts[block])
        found = official_names(block, parameter, layout, form=form, copies=copies, kinds=kinds)
        names |= dict.fromkeys(found, place)
    placed = destinations(names, size_of_heads)
    made: dict[str, Tensor] = {}
    for name, (block, parameter) in names.items():
        one = placed[name]
        assert (one.block, one.parameter) == (block, parameter), (
            f"{name} leads to {one.parameter}, not to {parameter}"
        )
        weight = _in_official_order(parameter, weights[block, parameter], router, experts[block])
        made[name] = one.inverse(one.view(weight)).clone(memory_format=torch.contiguous_format)
    return made | _idle_kind_gates(made)


def _form(own: ExpertConfig | None, parameter: str) -> str:
    """In which form `official_names` has the parameter of an expert, or of the router over its copies."""
    if own is None:
        return ""
    reads_input = parameter.endswith((".A", ".down_weight", ".down_bias"))
    router = own.copies()[1]
    return "one" if router is None or (reads_input and getattr(own, "shared", False)) else router.gate


def _idle_kind_gates(made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """UniPEFT's gates of kinds that a block lacks: the official code has them in each block, so they become zeros."""
    idle: dict[str, Tensor] = {}
    for name, one in made.items():
        start, gate, leaf = name.rsplit(".", 2)
        if gate in KIND_GATES:
            idle |= {f"{start}.{other}.{leaf}": torch.zeros_like(one) for other in KIND_GATES}
    return {name: one for name, one in idle.items() if name not in made}


def _in_official_order(
    parameter: str, weight: Tensor, router: RouterConfig | None, experts: Mapping[str, ExpertConfig]
) -> Tensor:
    """Bring the rows of a block's router, a row for each gate, into the order of the official code's columns."""
    if router is None or parameter not in _ROUTED:
        return weight
    own, official = list(experts), DEFAULT_ORDER
    if router.gate_of == "kind":
        own, official = _kinds(experts), tuple(KIND_GATES.values())
    return weight[[own.index(one) for one in official if one in own]]


def _experts_of_block(config: MoAConfig, block: int, weights: Weights) -> dict[str, ExpertConfig]:
    """The experts of a block by name, in the order of their gates."""
    there = {parameter.split(".")[1] for index, parameter in weights if index == block}
    return {
        name: own
        for name, own in named_experts(config)
        if name in there and (own.layers is None or block in own.layers)
    }


def _kinds(experts: Mapping[str, ExpertConfig]) -> list[str]:
    return list(dict.fromkeys(own.kind for own in experts.values()))


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
