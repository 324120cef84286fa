"""Writes the reference pages, as Markdown, from the package itself: nothing in them is typed a second time."""

import dataclasses
import inspect
import operator
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import benchmarks, brief, default_costs
from command_reference import commands
from families import counts, shapes, structures
from found import (
    answers,
    choices,
    claims,
    default,
    final_routers,
    finalists,
    first_page,
    several,
    several_claims,
)
from inspected import inspected
from method_reference import costs, method_table, methods, routing
from served import served
from wrapped import wrappers
from writing import fenced, markdown, source_paragraph, summary, table

ROOT = Path(__file__).parent.parent
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
    from moa_peft.training.trainer_settings import field_docs

    docs: dict[str, str] = {}
    for one in config_class.__mro__:
        if dataclasses.is_dataclass(one) and one.__module__.startswith("moa_peft"):
            docs = {**docs, **{name: text for name, text in field_docs(one).items() if name not in docs}}
    return docs


# ---- experts and gates -----------------------------------------------------------------------------------------------


def experts() -> str:
    """One row a kind of expert: what it adds, where, and where it comes from."""
    from moa_peft.mixture.experts import expert_kinds

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


def gates() -> str:
    """One row a kind of gate: what it does, which of a router's fields it reads, its balance loss and its source."""
    from moa_peft.mixture.config import GATES
    from moa_peft.mixture.gates import OPTIONS, Gate

    rows = []
    for name, gate in GATES.items():
        assert issubclass(gate, Gate), "register_gate takes gates only"
        options = ", ".join(f"`{option}`" for option in OPTIONS if option in gate.options)
        balance = f"{gate.default_balance:g}" if "balance" in gate.options else ""
        told = markdown(summary(gate).split(" Source: ")[0])
        rows.append((f"`{name}`", told, options, balance, markdown(source_paragraph(gate))))
    return table(("gate", "what it does", "fields of its own", "`balance` where it is None", "source"), rows)


# ---- configuration ---------------------------------------------------------------------------------------------------


def configuration() -> str:
    """A section for each config that a user writes."""
    from moa_peft import ArchitectureConfig, MoAConfig, RouterConfig, ThresholdConfig
    from moa_peft.mixture.experts import expert_kinds

    sections = [MoAConfig, RouterConfig, ThresholdConfig, *expert_kinds().values(), ArchitectureConfig]
    return "\n\n".join(config_section(one) for one in sections)


def recipe() -> str:
    """The keys of a recipe, and what is set differently from the trainer's own defaults."""
    from moa_peft.training.recipe import REFUSED, TRAINER_DEFAULTS, Recipe

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


# ---- studies ---------------------------------------------------------------------------------------------------------


def study() -> str:
    """The keys of a study and of one of its methods."""
    from moa_peft.study.config import Method, StudyConfig

    return "\n\n".join(
        [
            config_table(StudyConfig),
            "An entry of `methods` is the name of a method, or has these keys:",
            config_table(Method),
        ]
    )


def study_rows() -> str:
    """The fields of a row of a study, and of what stands in them."""
    from moa_peft.study.data import RowSet
    from moa_peft.study.rows import RunRow, Scores, StepTime

    parts = [field_table(RunRow)]
    for one, where in (
        (Scores, "`validation`, and each of `tests`"),
        (StepTime, "`step_ms`"),
        (RowSet, "`train`"),
    ):
        parts += [f"{where}: {markdown(summary(one))}", field_table(one)]
    return "\n\n".join(parts)


def field_table(row_class: Any) -> str:
    """One row a field of a row of results; there are no defaults that a reader needs."""
    docs = all_field_docs(row_class)
    return table(("field", "meaning"), [(f"`{name}`", markdown(text)) for name, text in docs.items()])


# ---- API -------------------------------------------------------------------------------------------------------------


def api() -> str:
    """Autodoc's directive for every public name."""
    import moa_peft

    beside = (
        "mixture.experts.LinearExpert",
        "mixture.experts.AttentionExpert",
        "mixture.gates.register_gate",
        "mixture.gates.Gate",
        "mixture.gates.GateResult",
    )
    names = [*moa_peft.__all__, *(one for one in beside if one.split(".")[-1] not in moa_peft.__all__)]
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
    "routing": routing,
    "costs": costs,
    "experts": experts,
    "gates": gates,
    "configuration": configuration,
    "recipe": recipe,
    "commands": commands,
    "study": study,
    "study_rows": study_rows,
    "api": api,
    "inspected": inspected,
    "benchmarks": benchmarks,
    "brief": brief,
    "families": structures,
    "shapes": shapes,
    "wrappers": wrappers,
    "served": served,
}
"""What can stand in a page, by the name in its mark, which readers of the bare page see."""

TABLES: Mapping[str, Mapping[str, Any]] = {
    "README.md": {"methods": method_table, "costs": default_costs, "found": first_page, "families": counts},
    "docs/found.md": {
        "answers": answers,
        "finalists": finalists,
        "claims": claims,
        "routers": final_routers,
        "code": lambda: claims("code"),
        "several": several,
        "several claims": several_claims,
        "default": default,
    },
    "docs/found_details.md": {"choices": choices},
}
"""What stands in a page as it is kept, between ``<!-- name -->`` and ``<!-- end of name -->``."""


def with_tables(page: str, text: str) -> str:
    """The text of a page with its tables written anew."""
    for name, write in TABLES[page].items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if (text.count(start), text.count(end)) != (1, 1):
            raise ValueError(f"{page} does not have the marks of {name} once each: write {start}{end}")
        before, _, rest = text.partition(start)
        text = f"{before}{start}{write()}{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    """Write the tables that pages are kept with anew."""
    for page in TABLES:
        path = ROOT / page
        path.write_text(with_tables(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
