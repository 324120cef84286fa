"""Writes the reference of the methods from the presets: equations, experts, routing, counted costs, source."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from costs import (
    BASELINE,
    SEQUENCE,
    added_operations,
    frozen_operations,
    gate_parameters,
    trainable_parameters,
)
from writing import linked, table

METHOD_NOTES = Path(__file__).parent / "method_notes"
"""One Markdown file a method: its equations and where it departs from its source."""


def expert_names(experts: Iterable[Any]) -> str:
    """Name the experts of a block in the order of their gates."""
    words = []
    for one in experts:
        sites = [name.removesuffix("_proj") for name in one.site_names()]
        at = f" on {', '.join(sites)}" if set(sites) - {"mlp", "attention"} else ""
        copies, _ = one.copies()
        times = f"{copies} x " if copies > 1 else ""
        words.append(times + one.kind.replace("_", " ").replace("lora", "LoRA") + at)
    return "; ".join(words)


def method_table() -> str:
    """One row a method, for the README."""
    from moa_peft.mixture.presets import PRESETS

    rows = [
        (
            f"`{name}`",
            preset.summary,
            expert_names(preset.experts),
            f"{trainable_parameters(name):,}",
            linked(preset.source),
        )
        for name, preset in PRESETS.items()
    ]
    return table(
        ("method", "what it does", "experts of a block", "trainable parameters (LLaMA-3.1-8B)", "source"),
        rows,
    )


def routing() -> str:
    """One row a method: where it is in the space of granularity, scope and gate."""
    from moa_peft.cli.methods import routing_of
    from moa_peft.mixture.presets import PRESETS

    rows = []
    for name, preset in PRESETS.items():
        for place in routing_of(preset) or [None]:
            words = ("-",) * 4 if place is None else _routing_words(place)
            rows.append((f"`{name}`", *words, expert_names(preset.experts)))
    return table(("method", "granularity", "scope", "gate", "router", "experts of a block"), rows)


def costs() -> str:
    """One row a method: its parameters, and its operations beside the frozen model's and plain LoRA's."""
    from moa_peft.mixture.presets import PRESETS

    frozen, baseline = frozen_operations(), added_operations(BASELINE)
    rows = []
    for name in PRESETS:
        added = added_operations(name)
        rows.append(
            (
                f"`{name}`",
                f"{trainable_parameters(name):,}",
                f"{added.sequence / 1e6:.1f}",
                f"+{added.sequence / frozen.sequence:.2%}",
                f"{added.sequence / baseline.sequence:.2f}",
                f"+{added.decoding / frozen.decoding:.2%}",
            )
        )
    head = (
        "method",
        "trainable parameters",
        "operations added for each token, in millions",
        "beside the frozen model",
        f"beside `{BASELINE}`, times",
        "a decoding step, beside the frozen model",
    )
    told = (
        f"The frozen model needs {frozen.sequence / 1e6:,.1f} million operations for each token of a sequence of "
        f"{SEQUENCE:,}, its head included; a multiplication and an addition are two. `{BASELINE}` is plain LoRA of rank "
        f"{_baseline_rank()} on the same projections."
    )
    return f"{told}\n\n{table(head, rows)}"


def methods() -> str:
    """A section for each method."""
    from moa_peft.mixture.presets import PRESETS

    return "\n\n".join(method_section(name, preset) for name, preset in PRESETS.items())


def method_section(name: str, preset: Any) -> str:
    """What a method does, its equations, experts, routing, costs and source."""
    from typing import get_args

    from moa_peft.mixture.config import RouterKind

    router = preset.router
    rows = [
        (f"`{one.kind}`", ", ".join(f"`{site}`" for site in one.site_names()), fields_of(one))
        for one in preset.experts
    ]
    parts = [
        f"## `{name}`",
        f"{preset.summary[0].upper()}{preset.summary[1:]}.",
        method_note(name),
        "**Experts of a block**, in the order of their gates:",
        table(("kind", "sites, one expert each", "settings"), rows),
        f"**Routing**: {routing_sentence(preset)}",
        f"**Cost** at the sizes of LLaMA-3.1-8B: {cost_sentence(name)}",
    ]
    if router is not None:
        kinds = [(f"`{kind}`", f"{trainable_parameters(name, kind):,}") for kind in get_args(RouterKind)]
        parts += [
            "**Trainable parameters** by the kind of the block's router:",
            table(("router", "parameters"), kinds),
        ]
    return "\n\n".join([*parts, f"**Source**: {linked(preset.source)}."])


def method_note(name: str) -> str:
    """A method's equations and departures, with the numbers they name counted."""
    text = (METHOD_NOTES / f"{name}.md").read_text(encoding="utf-8").strip()
    return re.sub(r"<!-- number: (\w+) -->", lambda mark: f"{NUMBERS[mark.group(1)]():,}", text)


NUMBERS: Mapping[str, Callable[[], int]] = {
    "unipeft": lambda: trainable_parameters("unipeft"),
    "one_gate_of_unipeft": lambda: gate_parameters("unipeft"),
}
"""What can stand in a method's note as ``<!-- number: NAME -->``."""


def routing_sentence(preset: Any) -> str:
    """Say what routers a block has, and what of their settings is not at its default."""
    from moa_peft.cli.methods import routing_of, routing_text

    told = "; ".join(routing_text(one) for one in routing_of(preset)) or "none, every gate is 1"
    router = preset.router
    if router is None:
        return f"{told}."
    changed = "".join(f", {key} {value}" for key, value in changed_fields(router).items())
    return f"{told}. The block's router has the router input `{router.router_input}`{changed}."


def cost_sentence(name: str) -> str:
    """A method's numbers in a sentence."""
    added, frozen, baseline = added_operations(name), frozen_operations(), added_operations(BASELINE)
    return (
        f"{trainable_parameters(name):,} trainable parameters; {added.sequence / 1e6:.1f} million operations for each token "
        f"of a sequence of {SEQUENCE:,}, which is {added.sequence / frozen.sequence:.2%} of the frozen model's and "
        f"{added.sequence / baseline.sequence:.2f} times those of `{BASELINE}` (rank {_baseline_rank()}); in a decoding "
        f"step of one sequence {added.decoding / frozen.decoding:.2%} of the frozen model's. Counted, not measured."
    )


def _baseline_rank() -> int:
    from moa_peft.mixture.presets import PRESETS

    (expert,) = PRESETS[BASELINE].experts
    return expert.rank  # type: ignore[attr-defined]  # the baseline is LoRA


def _routing_words(place: Mapping[str, Any]) -> tuple[str, str, str, str]:
    options = "".join(f", {name} {value}" for name, value in place["options"].items())
    scope = f"{place['scope']}, over the {place['weighs']}"
    return place["granularity"], scope, f"`{place['gate']}`{options}", place["router"]


def changed_fields(config: Any) -> dict[str, str]:
    """The fields of a config that are not at their defaults, but for those that are named anyway."""
    named = {"kind", "gate", "router_input", "granularity", "gate_of"}
    values = {one.name: (getattr(config, one.name), one.default) for one in dataclasses.fields(config)}
    return {
        name: f"`{short(value)}`"
        for name, (value, default) in values.items()
        if name not in named and value != default
    }


def short(value: Any) -> str:
    """Write a config as one would type it: without what is at its default."""
    if not dataclasses.is_dataclass(value):
        return repr(value)
    changed = [
        f"{one.name}={short(getattr(value, one.name))}"
        for one in dataclasses.fields(value)
        if getattr(value, one.name) != one.default
    ]
    return f"{type(value).__name__}({', '.join(changed)})"


def fields_of(expert: Any) -> str:
    """The settings of one expert but for its sites, and but for what an expert without copies has none of."""
    values = {one.name: getattr(expert, one.name) for one in dataclasses.fields(expert)}
    if values.get("num_experts") == 1:
        values = {name: value for name, value in values.items() if name not in COPY_FIELDS}
    left_out = ("layers", "targets")
    return ", ".join(f"`{name}={short(value)}`" for name, value in values.items() if name not in left_out)


COPY_FIELDS = ("num_experts", "router", "shared")
"""Fields of an expert that say nothing when there is one copy of it."""
