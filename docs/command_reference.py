"""Writes the reference of the command line from the commands' own help."""

import inspect
import re
import textwrap
from typing import Any

import typer
from writing import fenced, markdown, table


def command_group() -> Any:
    """The command `moa` with all its verbs."""
    from moa_peft import cli

    if not cli.app.registered_commands:
        cli.register_verbs()
    return typer.main.get_command(cli.app)


def commands() -> str:
    """A section for each verb, from its help."""
    group = command_group()
    return "\n\n".join(command_section(name, one) for name, one in group.commands.items())


def command_section(name: str, command: Any) -> str:
    """Usage, help text, arguments and options of one verb."""
    context = command.make_context(f"moa {name}", [], resilient_parsing=True)
    usage = " ".join([f"moa {name}", *command.collect_usage_pieces(context)])
    rows = [option_row(one) for one in command.params]
    head = ("option", "default", "meaning")
    if not any(default for _, default, _ in rows):
        head, rows = ("option", "meaning"), [(option, text) for option, _, text in rows]
    return "\n\n".join([f"## moa {name}", fenced(usage), help_text(command.help or ""), table(head, rows)])


def option_row(parameter: Any) -> tuple[str, str, str]:
    """One row of a verb's table of options."""
    is_option = parameter.opts[0].startswith("-")
    spelled = ", ".join(parameter.opts) if is_option else parameter.metavar or str(parameter.name).upper()
    default = getattr(parameter, "default", None)
    shown = "" if default in (None, False, ()) or callable(default) else f"`{default}`"
    return f"`{spelled}`", "required" if parameter.required else shown, getattr(parameter, "help", None) or ""


def help_text(text: str) -> str:
    """Turn a verb's help into Markdown: what stands after a backspace keeps its lines, in a block."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith("\b"):
            head, *lines = paragraph.removeprefix("\b").strip("\n").splitlines()
            is_title = head.endswith(":")
            if is_title:
                parts.append(head)
            parts.append(fenced(textwrap.dedent("\n".join(lines if is_title else [head, *lines]))))
        elif found := re.fullmatch(r"Example: (.*)", paragraph):
            parts += ["Example:", fenced(found.group(1))]
        else:
            parts.append(markdown(" ".join(paragraph.split())))
    return "\n\n".join(parts)
