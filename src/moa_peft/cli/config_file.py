"""Options of a verb from a YAML file: the command line goes before the file, the file before the defaults."""

from pathlib import Path

import typer

from moa_peft.cli.overrides import load_yaml
from moa_peft.errors import UsageError, unknown

FLAGS_ONLY = ("config", "help", "allow_code_execution")
"""What a file may not set: leave to run a model's programs is given by a person, for one call."""


def options_from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take a verb's options from a file; the callback of an eager option ``--config``.

    Args:
        context: The verb's, whose defaults become those of the file.
        path: The file; its keys are the options' names, with dashes or underscores. A list stands for its entries with
            commas between.

    Returns:
        The path.

    Raises:
        UsageError: If the file cannot be read, or a key is no option of the verb.
    """
    if path is None or context.resilient_parsing:
        return path
    settings = {name.replace("-", "_"): value for name, value in load_yaml(path).items()}
    by_flag = {one.opts[0].removeprefix("--").replace("-", "_"): one for one in context.command.params}
    for name, value in settings.items():
        if name in FLAGS_ONLY:
            raise UsageError(f"{path}: {name} cannot stand in a file: give it on the command line")
        if name not in by_flag:
            raise UsageError(f"{path}: {unknown('option', name, set(by_flag) - set(FLAGS_ONLY))}")
        if isinstance(value, bool) and not getattr(by_flag[name], "is_flag", False):
            raise UsageError(f"{path}: {name} is {str(value).lower()}: give a value, as on the command line")
    context.default_map = {str(by_flag[name].name): _plain(value) for name, value in settings.items()}
    return path


def _plain(value: object) -> object:
    return ",".join(str(one) for one in value) if isinstance(value, list) else value
