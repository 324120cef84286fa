"""JSON and JSON-lines files, zipped or not, read as records with the place each one stands at."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from moa_peft.errors import UsageError

SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz")
"""How the name of a row file may end."""


_UNREADABLE = (ValueError, RecursionError)
"""What Python raises at JSON with a number of too many digits, or nested too deeply."""


def is_row_file(name: str) -> bool:
    """Tell whether a name ends as the name of a row file does."""
    return name.endswith(SUFFIXES)


def split_name(file: Path) -> str:
    """The split that a file in a folder holds: its name without the ending."""
    return next(
        file.name.removesuffix(end)
        for end in sorted(SUFFIXES, key=len, reverse=True)
        if file.name.endswith(end)
    )


def read_records(file: Path) -> Iterator[tuple[str, Any]]:
    """Read the records of a file one after the other.

    Args:
        file: A file whose name ends in one of `SUFFIXES`. A `.json` file holds one list, a `.jsonl` file one JSON
            value a line, where blank lines count for nothing.

    Yields:
        Where the record stands, such as "data.jsonl, line 3", and the record, not yet looked at.

    Raises:
        UsageError: If the file is missing, empty, damaged or malformed; the message names the line.
    """
    if not file.is_file():
        raise UsageError(f"data file {file} does not exist" if not file.exists() else f"{file} is not a file")
    try:
        with _open_text(file) as text:
            lines = file.name.removesuffix(".gz").endswith(".jsonl")
            yield from _lines(file, text) if lines else _list(file, text)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"data file {file} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"data file {file} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise UsageError(f"data file {file} cannot be read: {error.strerror or error}") from error


def _open_text(file: Path) -> TextIO:
    if file.name.endswith(".gz"):
        return cast("TextIO", gzip.open(file, "rt", encoding="utf-8-sig"))
    return file.open(encoding="utf-8-sig")


def _lines(file: Path, text: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
        except _UNREADABLE as error:
            raise UsageError(f"{where}: cannot be read: {error}") from error


def _list(file: Path, text: TextIO) -> Iterator[tuple[str, Any]]:
    content = text.read()
    if not content.strip():
        raise UsageError(f"data file {file} is empty")
    try:
        records = json.loads(content)
    except json.JSONDecodeError as error:
        hint = ""
        if content.lstrip().startswith("{"):
            hint = "; it should be one list [...]; if it is one object a line, let its name end in .jsonl"
        raise UsageError(
            f"{file}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}{hint}"
        ) from error
    except _UNREADABLE as error:
        raise UsageError(f"data file {file} cannot be read: {error}") from error
    if not isinstance(records, list):
        raise UsageError(
            f"data file {file} holds one {type(records).__name__}: it should be a list of rows [...]"
        )
    for number, record in enumerate(records, start=1):
        yield f"{file}, row {number}", record
