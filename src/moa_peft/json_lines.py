"""Files of JSON lines that survive a kill: rows are appended whole, and a line that was cut off is noticed."""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moa_peft.errors import UsageError


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a last line that a kill cut off is left out.

    Args:
        file: The file; need not exist.

    Returns:
        The rows.

    Raises:
        UsageError: If another line is not a JSON object.
    """
    return _whole_lines(file)[0]


def drop_torn_line(file: Path) -> bool:
    """Take a last line off that a kill cut off, so that the next row starts on a line of its own.

    Args:
        file: The file; need not exist.

    Returns:
        Whether there was one.

    Raises:
        UsageError: As `read_rows`.
    """
    _, size = _whole_lines(file)
    if not file.exists() or file.stat().st_size == size:
        return False
    with file.open("r+b") as content:
        content.truncate(size)
        os.fsync(content.fileno())
    return True


def append_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append whole lines in one write, or none of them, and see them onto the disk.

    Args:
        file: The file; it and its folder are made where needed.
        rows: One JSON object a line; NaN and infinity are refused by the writer.

    Raises:
        OSError: If the disk is full; the file is then as it was.
    """
    text = "".join(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in rows).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(handle, text)
        if written != len(text):
            os.ftruncate(handle, os.fstat(handle).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines anew: whole, or not at all."""
    draft = file.with_name(f".{file.name}.tmp")
    draft.unlink(missing_ok=True)
    append_rows(draft, rows)
    draft.replace(file)


def _whole_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file's whole lines, and how many bytes these take."""
    rows: list[dict[str, Any]] = []
    size = 0
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise UsageError(f"{file}, line {number}: not a JSON object: delete the file, or mend the line")
        else:
            break
        size += len(line)
    return rows, size
