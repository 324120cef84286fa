"""`moa exec`: run any command with the method known to PEFT in every Python process that it starts."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from moa_peft.errors import UsageError
from moa_peft.extras import EXTRAS, install_hint

AUTOLOAD = Path(__file__).parents[1] / "autoload"
"""The folder whose sitecustomize registers the method."""
TRL_TRAINS = ("dpo", "grpo", "kto", "reward", "rloo", "sft")
"""The commands of TRL that train; none takes another method than LoRA."""


def exec_(
    command: Annotated[
        list[str], typer.Argument(help="The command and its arguments, after two dashes.", metavar="CMD")
    ],
) -> None:
    """Run any command with the method known to PEFT, in all the Python processes that it starts.

    Tools that load adapters through PEFT or transformers then load those of moa like any other. The programs next to
    this one (of its virtual environment) are found first.

    \b
    Examples:
      moa exec -- lm_eval --model hf --model_args pretrained=BASE,peft=runs/first --tasks arc_easy
      moa exec -- accelerate launch my_script.py
    """  # noqa: D301  # the backspace keeps the lines of the examples apart
    if command[0] == "trl" and command[1:2] and command[1] in TRL_TRAINS:
        raise UsageError(
            f"trl {command[1]} trains the whole model, or plain LoRA with --use_peft: it takes no other method. "
            "`moa train` takes every field of SFTConfig; for TRL's other trainers give peft_config=MoAConfig.preset(...) to "
            "the trainer in a script"
        )
    environment = with_autoload(os.environ)
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        extra = next(
            (one for one, modules in EXTRAS.items() if command[0].replace("-", "_") in modules), None
        )
        hint = f": {install_hint(extra)}" if extra else ": give the path of a program, or install it here"
        raise UsageError(f"there is no command {command[0]!r}{hint}")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program, [program, *command[1:]], environment)
    except OSError as error:  # a script whose interpreter is gone is "no such file", though it is there
        raise UsageError(
            f"{program} cannot be run: {error.strerror}. If its first line names an interpreter that has moved, install it again"
        ) from None


def with_autoload(environment: Mapping[str, str]) -> dict[str, str]:
    """Add what makes the method known to an environment.

    Args:
        environment: The variables as they are.

    Returns:
        The same with the folder of the hook first on PYTHONPATH, and this interpreter's programs first on PATH.
    """
    found = dict(environment)
    for name, first in (("PYTHONPATH", str(AUTOLOAD)), ("PATH", str(Path(sys.executable).parent))):
        parts = [one for one in found.get(name, "").split(os.pathsep) if one and one != first]
        found[name] = os.pathsep.join([first, *parts])
    return found
