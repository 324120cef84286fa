"""Libraries that only some verbs need: what they are installed with, and how to say that they are missing."""

import importlib
from collections.abc import Mapping
from types import ModuleType

from moa_peft.errors import UsageError

EXTRAS: Mapping[str, tuple[str, ...]] = {"eval": ("lm_eval", "math_verify")}
"""The modules that each extra of the package brings."""


def install_hint(extra: str) -> str:
    """The command that installs an extra."""
    return f"it comes with pip install 'moa-peft[{extra}]'"


def require(module: str, what_for: str) -> ModuleType:
    """Import a module of an extra.

    Args:
        module: One of those in `EXTRAS`, or a part of one.
        what_for: What needs it, to begin the error with.

    Returns:
        The module.

    Raises:
        UsageError: If it is not installed; names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        extra = next(name for name, modules in EXTRAS.items() if top in modules)
        raise UsageError(
            f"{what_for} needs {error.name}, which is not installed: {install_hint(extra)}"
        ) from error
