"""The package's errors, and what their messages are made of.

Each error is also a builtin kind, so `except ValueError` goes on working.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class MoAError(Exception):
    """Base of every error that this package raises on purpose."""


class UsageError(MoAError, ValueError):
    """What was asked for cannot be done as asked; the message says what is allowed. Exit code 2."""


class RunError(MoAError, RuntimeError):
    """What was asked for was sound but failed on the way. Exit code 1."""


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """Say that a name is not known, with the nearest one that is.

    Args:
        what: The kind of thing named, as in "expert" or "router field".
        given: The name that was given.
        known: The names that are allowed.

    Returns:
        One sentence for an error message.
    """
    names = sorted(known)
    near = get_close_matches(given, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {given!r}: {hint}known: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """What an error says in its first line, for a message of one line."""
    return str(error).strip().partition("\n")[0]


def expanded(path: str | Path) -> Path:
    """Expand a leading ``~``; that of an unknown user stays, and is then reported as missing like any other path."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
