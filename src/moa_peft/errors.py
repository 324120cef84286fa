"""The package's errors, and what their messages are made of.

Each error is also a builtin kind, so `except ValueError` goes on working.
"""

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

_LONGEST = 2000
"""Characters of a message; what is beyond is cut out of its middle, where a long value stands."""

_LIBRARIES = ("transformers", "trl", "accelerate", "peft", "datasets", "huggingface_hub", "lm_eval")
"""The libraries that check what a user sets. What they call in turn (torch, loggers, Python's own) counts as theirs."""


class MoAError(Exception):
    """Base of every error that this package raises on purpose."""

    def __str__(self) -> str:
        text = super().__str__()
        left_out = len(text) - _LONGEST
        if left_out <= 0:
            return text
        return f"{text[: _LONGEST // 2]} [... {left_out:,} characters ...] {text[-_LONGEST // 2 :]}"


class UsageError(MoAError, ValueError):
    """What was asked for cannot be done as asked; the message says what is allowed. Exit code 2."""


class LibraryError(UsageError):
    """Another library refused what was asked for; its own error is the cause. Exit code 2."""


class RunError(MoAError, RuntimeError):
    """What was asked for was sound but failed on the way. Exit code 1."""


@contextmanager
def library_errors(what: str = "") -> Iterator[None]:
    """Turn what other libraries raise for a user's setting into one `LibraryError`; our own faults pass as they are.

    The innermost frame of the traceback that lies in this package or in one of `_LIBRARIES` decides whose error it is; torch, a
    logger or Python itself fails for whoever called it. A fault of ours that shows only inside a library looks like a setting;
    the whole traceback, which is kept as the cause, tells it.

    Args:
        what: What went wrong, to begin the message with; the library's name by default.

    Raises:
        LibraryError: Instead of such an error. A lack of memory counts as one, wherever it shows.
    """
    try:
        yield
    except Exception as error:
        is_told = isinstance(error, MoAError) or (isinstance(error, OSError) and error.errno is not None)
        library = None if is_told else _raised_by(error)
        if library is None:
            raise
        raise LibraryError(f"{what or f'{library} refuses this'}: {_said(error)}") from error


def _raised_by(error: BaseException) -> str | None:
    """The library whose error it is; None where it is this package's."""
    if (
        isinstance(error, MemoryError)
        or "OutOfMemory" in type(error).__name__
        or "allocate memory" in str(error)
    ):
        return "torch"
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if module == __name__.partition(".")[0]:
            return None
        if module in _LIBRARIES:
            return module
    return None


def _said(error: BaseException) -> str:
    """The kind and the message of an error, on one line."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(f"{type(error).__name__}: {text}".split())


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
    near = get_close_matches(str(given), names, n=1)
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
