"""Writes the reference pages, as Markdown, from the package itself: nothing in them is typed a second time."""

import dataclasses
import inspect
import operator
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from command_reference import commands
from writing import fenced, linked, markdown, source_paragraph, summary, table

METHOD_NOTES = Path(__file__).parent / "method_notes"
"""One Markdown file a method: its equations and where it departs from its source."""

LLAMA_31_8B: Mapping[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""The sizes of LLaMA-3.1-8B, on which the numbers of parameters are counted."""


EVERY_OTHER_KEY = (
    "Every other key is a field of `trl.SFTConfig`, written flat beside these. Where a recipe says nothing, these "
    "differ from the trainer's own defaults, or are said because they matter:"
)
"""What leads from a recipe's own keys to the trainer's."""

INTERNALS = ("MoALayer", "MoAModel")
"""Classes whose members PEFT calls, not the user."""


# ---- doc lines -------------------------------------------------------------------------------------------------------


def all_field_docs(config_class: type) -> dict[str, str]:
    """Read the string under each field of a dataclass, inherited fields last."""
    from moa_peft.train.field_docs import field_docs

    docs: dict[str, str] = {}
    for one in config_class.__mro__:
        if dataclasses.is_dataclass(one) and one.__module__.startswith("moa_peft"):
            docs = {**docs, **{name: text for name, text in field_docs(one).items() if name not in docs}}
    return docs


# ---- methods ---------------------------------------------------------------------------------------------------------


@cache
def trainable_parameters(method: str, router_kind: str) -> int:
    """Count a method's trainable parameters at the sizes of LLaMA-3.1-8B, on the meta device."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from moa_peft import MoAConfig

    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**LLAMA_31_8B))
    model = get_peft_model(base, MoAConfig.preset(method, router={"kind": router_kind}))
    return model.get_nb_trainable_parameters()[0]


def expert_names(experts: Iterable[Any]) -> str:
    """Name the experts of a block in the order of their gates."""
    words = []
    for one in experts:
        sites = [name.removesuffix("_proj") for name in one.site_names()]
        at = f" on {', '.join(sites)}" if set(sites) - {"mlp", "attention"} else ""
        words.append(one.kind.replace("_", " ").replace("lora", "LoRA") + at)
    return "; ".join(words)


def method_table() -> str:
    """One row a method, for the README."""
    from moa_peft.presets import PRESETS

    rows = [
        (
            f"`{name}`",
            preset.summary,
            expert_names(preset.experts()),
            f"{trainable_parameters(name, preset.router().kind):,}",
            linked(preset.source),
        )
        for name, preset in PRESETS.items()
    ]
    return table(
        ("method", "what it does", "experts of a block", "trainable parameters (LLaMA-3.1-8B)", "source"),
        rows,
    )


def methods() -> str:
    """A section for each method, and one for each kind of expert."""
    from typing import get_args

    from moa_peft.config import RouterKind
    from moa_peft.presets import PRESETS

    parts = []
    for name, preset in PRESETS.items():
        router = preset.router()
        changed = changed_fields(router)
        counts = [(f"`{kind}`", f"{trainable_parameters(name, kind):,}") for kind in get_args(RouterKind)]
        rows = [
            (f"`{one.kind}`", ", ".join(f"`{site}`" for site in one.site_names()), fields_of(one))
            for one in preset.experts()
        ]
        parts += [
            f"## `{name}`",
            f"{preset.summary[0].upper()}{preset.summary[1:]}.",
            (METHOD_NOTES / f"{name}.md").read_text(encoding="utf-8").strip(),
            "**Experts of a block**, in the order of their gates:",
            table(("kind", "sites, one expert each", "settings"), rows),
            f"**Router**: `{router.kind}`, gate `{router.gate}`, router input `{router.router_input}`"
            + "".join(f", {key} {value}" for key, value in changed.items())
            + ".",
            "**Trainable parameters** at the sizes of LLaMA-3.1-8B, by the kind of router:",
            table(("router", "parameters"), counts),
            f"**Source**: {linked(preset.source)}.",
        ]
    return "\n\n".join(parts)


def changed_fields(config: Any) -> dict[str, str]:
    """The fields of a config that are not at their defaults, but for those that are named anyway."""
    named = {"kind", "gate", "router_input"}
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
    """The settings of one expert but for its sites."""
    left_out = ("layers", "targets")
    return ", ".join(
        f"`{one.name}={getattr(expert, one.name)!r}`"
        for one in dataclasses.fields(expert)
        if one.name not in left_out
    )


def experts() -> str:
    """One row a kind of expert: what it adds, where, and where it comes from."""
    from moa_peft.experts import expert_kinds

    rows = []
    for kind, config_class in expert_kinds().items():
        built = inspect.signature(config_class.build).return_annotation
        change = getattr(sys.modules[config_class.__module__], built) if isinstance(built, str) else built
        rows.append(
            (
                f"`{kind}`",
                config_class.__name__,
                markdown(summary(change)),
                markdown(source_paragraph(change)),
            )
        )
    return table(("kind", "config", "what it adds", "source"), rows)


# ---- configuration ---------------------------------------------------------------------------------------------------


def configuration() -> str:
    """A section for each config that a user writes."""
    from moa_peft import ArchitectureConfig, MoAConfig, RouterConfig, ThresholdConfig
    from moa_peft.experts import expert_kinds

    sections = [MoAConfig, RouterConfig, ThresholdConfig, *expert_kinds().values(), ArchitectureConfig]
    return "\n\n".join(config_section(one) for one in sections)


def recipe() -> str:
    """The keys of a recipe, and what is set differently from the trainer's own defaults."""
    from moa_peft.train.recipe import REFUSED, TRAINER_DEFAULTS, Recipe

    keys = config_table(Recipe, leave_out=("trainer",))
    defaults = table(
        ("key of `trl.SFTConfig`", "set to"),
        [(f"`{key}`", f"`{value!r}`") for key, value in TRAINER_DEFAULTS.items()],
    )
    refused = table(
        ("key of `trl.SFTConfig`", "instead"), [(f"`{key}`", markdown(why)) for key, why in REFUSED.items()]
    )
    return "\n\n".join(
        [
            keys,
            EVERY_OTHER_KEY,
            defaults,
            "These fields of the trainer have no meaning in a recipe and are refused:",
            refused,
        ]
    )


def config_section(config_class: type) -> str:
    """A heading, the class's first line and the table of its fields."""
    kind = getattr(config_class, "kind", None)
    note = f" Its `kind` in files is `{kind}`." if isinstance(kind, str) else ""
    return f"## {config_class.__name__}\n\n{markdown(summary(config_class))}{note}\n\n{config_table(config_class)}"


def config_table(config_class: Any, leave_out: Iterable[str] = ()) -> str:
    """One row a field."""
    docs = all_field_docs(config_class)
    own = {one.name: one for one in dataclasses.fields(config_class)}
    rows = [
        (f"`{name}`", f"`{type_name(own[name].type)}`", default_of(own[name]), markdown(text))
        for name, text in docs.items()
        if name in own and name not in leave_out
    ]
    return table(("field", "type", "default", "meaning"), rows)


def type_name(annotation: Any) -> str:
    """Write a type as a reader of the docs wants it: short names, `Literal`s as their choices."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(\w+)", r"\1", text)
    text = re.sub(r"Literal\[([^\]]*)\]", lambda found: found.group(1).replace(", ", " | "), text)
    return text.replace("'", '"')


def default_of(field: Any) -> str:
    """Write a field's default."""
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return f"`{type(made).__name__}()`" if dataclasses.is_dataclass(made) else f"`{made!r}`"
    return "required"


# ---- API -------------------------------------------------------------------------------------------------------------


def api() -> str:
    """Autodoc's directive for every public name."""
    import moa_peft

    names = [*moa_peft.__all__, "experts.LinearExpert", "experts.AttentionExpert"]
    lines = []
    for name in names:
        thing = operator.attrgetter(name)(moa_peft)
        lines.append(f".. {'autoclass' if inspect.isclass(thing) else 'autofunction'}:: moa_peft.{name}")
        if inspect.isclass(thing) and name not in INTERNALS:
            lines.append("   :members:")
        lines.append("")
    return fenced("\n".join(lines).strip(), "{eval-rst}")


GENERATED: Mapping[str, Any] = {
    "methods": methods,
    "experts": experts,
    "configuration": configuration,
    "recipe": recipe,
    "commands": commands,
    "api": api,
}
"""What can stand in a page as ``<!-- generated: NAME -->``."""


def main() -> None:
    """Print one reference: ``python docs/reference.py methods`` prints the README's table of methods."""
    known = {"methods": method_table}
    if len(sys.argv) != 2 or sys.argv[1] not in known:
        sys.exit(f"usage: python docs/reference.py {'|'.join(known)}")
    print(known[sys.argv[1]]())


if __name__ == "__main__":
    main()
