"""Optional dependencies: which extra of the package installs them, and the error when one is missing."""

import importlib
import importlib.util
from collections.abc import Mapping
from types import ModuleType

from moa_peft.errors import UsageError

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "eval": ("lm_eval", "math_verify"),
    "report": ("matplotlib", "scipy"),
    "ray": ("ray",),
    "serve": ("starlette", "uvicorn"),
}
"""The modules that each extra of the package installs."""


def install_hint(extra: str) -> str:
    """What installs an extra."""
    return f"in a checkout of moa-peft, pip install -c constraints.txt '.[{extra}]'"


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
        raise UsageError(
            f"{what_for} needs {error.name}, which is not installed: {install_hint(_extra_of(module))}"
        ) from error


def is_installed(module: str) -> bool:
    """Whether a module is installed; does not import it."""
    return importlib.util.find_spec(module) is not None


def check_installed(extra: str) -> None:
    """Check that every module of an extra is installed, without importing one.

    Raises:
        UsageError: If one is missing; the message has the command that installs it.
    """
    for module in EXTRAS[extra]:
        if not is_installed(module):
            raise UsageError(f"this needs {module}, which is not installed: {install_hint(extra)}")


def _extra_of(module: str) -> str:
    top = module.partition(".")[0]
    return next(name for name, modules in EXTRAS.items() if top in modules)
