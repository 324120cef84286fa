"""An inspection: one pass over prompts, for one adapter, or for two that read the same tokens."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from moa_peft.errors import UsageError
from moa_peft.evaluation.batching import rows_at_once
from moa_peft.evaluation.loading import AdapterFolder, choose_base
from moa_peft.inspection.agreement import AgreementStatistics, AgreementSums
from moa_peft.inspection.findings import sentences
from moa_peft.inspection.forward_pass import TokenText, batches, check_texts, observe
from moa_peft.inspection.observer import Observed, Observer
from moa_peft.inspection.results import Finding, GroupStatistics, RouterStatistics, router_statistics
from moa_peft.inspection.token_view import ShownPrompt, ShownTokens
from moa_peft.mixture.block_hooks import mixture_layers

SECOND = "compare"
"""The name of a second adapter in the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What was found."""

    findings: dict[str, Finding]
    """By the adapter's name in the model; one or two."""
    agreement: tuple[AgreementStatistics, ...]
    """Of two adapters, by layer; empty for one."""
    prompts: tuple[ShownPrompt, ...]
    """The first prompts with the gates of their tokens, as many as there is room for."""
    num_prompts: int
    """All that were read."""
    num_tokens: int
    """Their tokens, padding not counted."""


def inspect_model(
    model: Any,
    texts: Sequence[TokenText],
    about: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda _: None,
) -> Inspection:
    """Collect statistics of a model's mixtures on texts, in one pass; their memory does not depend on the number of texts.

    Args:
        model: A causal language model of transformers with a mixture, in PEFT's wrapper or loaded by transformers alone.
        texts: What to read, from `moa_peft.inspection.prompts.tokenise`.
        about: The adapters to inspect, by their names in the model, with what is known of each; None for the active one.
        batch_size: Most texts in a forward pass; no number depends on it beyond rounding.
        progress: Called after each batch with the number of its texts.

    Raises:
        UsageError: If the model has no mixture, or a text cannot be read.
        RunError: If a gate is not finite.
    """
    layers = [layer for _, layer in mixture_layers(model)]
    if not layers:
        raise UsageError(
            "the model has no mixture of adapters: give an adapter that was trained with one of the methods that "
            "`moa methods` lists"
        )
    check_texts(model, texts)
    active = layers[0].active_adapters[0]
    about = {active: {}} if about is None else about
    there = {name for layer in layers for name in layer.mixtures()}
    if others := [known.get("adapter", name) for name, known in about.items() if name not in there]:
        raise UsageError(f"the adapter {others[0]} is no mixture of adapters: give one that is")
    observer, agreement = Observer(model), AgreementSums()
    shown: ShownTokens | None = None
    try:
        for places in batches(texts, rows_at_once(model, batch_size)):
            rows = [texts[place] for place in places]
            observed: list[Observed] = []
            for adapter in about:
                if adapter != layers[0].active_adapters[0]:
                    model.set_adapter(adapter)
                observed.append(observe(model, observer, rows))
            widths = [gates.shape[1] for one in observed for gates in one.gates.values()]
            shown = shown or ShownTokens(texts, sum(widths))
            for one in observed:
                shown.keep(places, one)
            if len(observed) > 1:
                agreement.add(observed[0], observed[1], observer.names)
            progress(len(places))
    finally:
        if active != layers[0].active_adapters[0]:
            model.set_adapter(active)
    return Inspection(
        findings={name: _finding(model, observer, name, known) for name, known in about.items()},
        agreement=tuple(agreement.statistics()),
        prompts=() if shown is None else tuple(shown.prompts()),
        num_prompts=len(texts),
        num_tokens=sum(len(one.ids) for one in texts),
    )


def _finding(model: nn.Module, observer: Observer, adapter: str, about: Mapping[str, Any]) -> Finding:
    layers = {layer.block.index: layer for _, layer in mixture_layers(model) if adapter in layer.mixtures()}
    routers: list[RouterStatistics] = []
    for where in sorted(one for one in observer.gates if one.adapter == adapter):
        router = layers[where.layer].mixtures()[adapter].routers()[where.router]
        routers.append(
            router_statistics(
                where.layer,
                where.router,
                observer.names[where],
                observer.gates[where],
                granularity=router.config.granularity,
                trained=_trained(router.gate),
            )
        )
    groups = [
        GroupStatistics(layer=where.layer, router=where.router, changes=observer.groups[where].statistics())
        for where in sorted(observer.groups)
        if where.adapter == adapter
    ]
    told = sentences(routers, groups)
    return Finding(routers=tuple(routers), groups=tuple(groups), about=dict(about), sentences=told)


def _trained(gate: nn.Module) -> bool | None:
    """Whether a gate's learned threshold has moved: its bias starts at 0 and no optimiser leaves it there."""
    bias = getattr(gate, "threshold_bias", None)
    return None if bias is None else bool((bias != 0).any())


def check_same_base(
    first: AdapterFolder, second: AdapterFolder, model: str | None, init_kwargs: Mapping[str, Any]
) -> None:
    """Check that two adapters were trained on one base model.

    Args:
        first: One of them.
        second: The other.
        model: What the user has named as the base model of both; None for nothing.
        init_kwargs: How it is loaded, as `choose_base` takes them.

    Raises:
        UsageError: If they were not.
    """
    if second.base_model is None:
        return
    one, other = (choose_base(model, folder, init_kwargs) for folder in (first, second))
    if one.place() != other.place():
        raise UsageError(
            f"--compare {second.name} was trained on {' '.join(other.place())}, the first adapter runs on "
            f"{' '.join(one.place())}: the two must have one base model; --model names it where it lies under several names"
        )


def about_adapter(model: Any, name: str, folder: AdapterFolder, base_model: str) -> dict[str, Any]:
    """Describe an adapter by its name in the model, its folder and what it runs on.

    Returns:
        ``adapter``, ``method``, ``base_model``, ``seed``; ``parameters``, rows of part, number in one block, number in
        all; ``config``, its `adapter_config.json`.
    """
    in_all: Counter[str] = Counter()
    in_one: dict[str, int] = {}
    for _, layer in mixture_layers(model):
        mixture = layer.mixtures().get(name)
        if mixture is None:
            continue
        parts = [(f"router of {key}" if key else "router", one) for key, one in mixture.routers().items()]
        for part, module in [*mixture.experts.items(), *parts]:
            number = sum(one.numel() for one in module.parameters())
            in_one.setdefault(part, number)
            in_all[part] += number
    config = json.loads((folder.path / "adapter_config.json").read_text(encoding="utf-8"))
    config.pop("base_model_name_or_path", None)  # a folder of this machine; ``base_model`` is its name
    return {
        "adapter": folder.name,
        "method": folder.method,
        "base_model": base_model,
        "seed": folder.seed,
        "trained_parameters": f"{sum(in_all.values()):,}",
        "parameters": [(part, in_one[part], in_all[part]) for part in in_all],
        "config": config,
    }
