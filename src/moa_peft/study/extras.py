"""Packages that only some of a study needs."""

import importlib.util

from moa_peft.errors import UsageError

REPORT_PACKAGES = ("matplotlib", "scipy")
"""What the report needs."""


def has(package: str) -> bool:
    """Whether an optional package is installed."""
    return importlib.util.find_spec(package) is not None


def need(package: str, extra: str) -> None:
    """See that an optional package is there.

    Raises:
        UsageError: If it is not; the message has the command that installs it.
    """
    if not has(package):
        raise UsageError(f"this needs {package}, which is not installed: pip install 'moa-peft[{extra}]'")
