"""An inspection: one pass over prompts, for one adapter or for two that read the same tokens side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from moa_peft.errors import UsageError
from moa_peft.evaluation.batching import rows_at_once
from moa_peft.inspection.agreement import AgreementStatistics, AgreementSums
from moa_peft.inspection.findings import sentences
from moa_peft.inspection.forward_pass import TokenText, batches, check_texts, hear
from moa_peft.inspection.observer import Heard, Listener
from moa_peft.inspection.results import Finding, GroupStatistics, RouterStatistics, router_statistics
from moa_peft.inspection.token_view import ShownPrompt, ShownTokens
from moa_peft.mixture.block_hooks import mixture_layers


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
    progress: Callable[[int], None] = lambda _: None,
) -> Inspection:
    """Look at what the mixtures of a model do on texts, in one pass.

    Args:
        model: A causal language model of transformers with a mixture, in PEFT's wrapper or loaded by transformers alone.
        texts: What to read, from `moa_peft.inspection.prompts.tokenise`.
        about: The adapters to look at, by their names in the model, with what is known of each; None for the active one.
        batch_size: Most texts in a forward pass; no number depends on it beyond rounding.
        progress: Called with the number of texts read so far.

    Returns:
        The statistics. The memory they take does not depend on the number of texts.

    Raises:
        UsageError: If the model has no mixture, or a text cannot be read.
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
    for name, known in about.items():
        if not any(name in layer.mixtures() for layer in layers):
            raise UsageError(
                f"the adapter {known.get('adapter', name)} is no mixture of adapters: give one that is"
            )
    listener, agreement = Listener(model), AgreementSums()
    shown: ShownTokens | None = None
    done = 0
    for places in batches(texts, rows_at_once(model, batch_size)):
        rows = [texts[place] for place in places]
        heard: list[Heard] = []
        for adapter in about:
            if len(about) > 1:
                model.set_adapter(adapter)
            heard.append(hear(model, listener, rows))
        widths = [gates.shape[1] for one in heard for gates in one.gates.values()]
        shown = shown or ShownTokens(texts, sum(widths))
        for one in heard:
            shown.keep(places, one)
        if len(heard) > 1:
            agreement.add(heard[0], heard[1], listener.names)
        done += len(places)
        progress(done)
    if len(about) > 1:
        model.set_adapter(active)
    return Inspection(
        findings={name: _finding(model, listener, name, known) for name, known in about.items()},
        agreement=tuple(agreement.statistics()),
        prompts=() if shown is None else tuple(shown.prompts()),
        num_prompts=len(texts),
        num_tokens=sum(len(one.ids) for one in texts),
    )


def _finding(model: nn.Module, listener: Listener, adapter: str, about: Mapping[str, Any]) -> Finding:
    layers = {layer.block.index: layer for _, layer in mixture_layers(model) if adapter in layer.mixtures()}
    routers: list[RouterStatistics] = []
    for where in sorted(one for one in listener.gates if one.adapter == adapter):
        router = layers[where.layer].mixtures()[adapter].routers()[where.router]
        routers.append(
            router_statistics(
                where.layer,
                where.router,
                listener.names[where],
                listener.gates[where],
                granularity=router.config.granularity,
                trained=_trained(router.gate),
            )
        )
    groups = [
        GroupStatistics(layer=where.layer, router=where.router, changes=sums.statistics())
        for where, sums in sorted(listener.groups.items(), key=lambda one: one[0])
        if where.adapter == adapter
    ]
    return Finding(
        routers=tuple(routers), groups=tuple(groups), about=dict(about), sentences=sentences(routers, groups)
    )


def _trained(gate: nn.Module) -> bool | None:
    """Whether a gate's learned threshold has moved: its bias starts at 0 and no optimiser leaves it there."""
    bias = getattr(getattr(gate, "threshold", None), "bias", None)
    return None if bias is None else bool((bias != 0).any())
