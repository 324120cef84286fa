"""Files of JSON that survive a kill: rows are appended whole, and a line that was cut off is noticed.

Several processes may write to one file: each has it to itself while it changes it.
"""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moa_peft.errors import UsageError

RESULTS_FILE = "results.jsonl"
"""Rows of results, in the folder of a run, an evaluation or a study."""


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a last line that a kill cut off is left out, one that lacks no more than its end is not.

    Args:
        file: The file; need not exist.

    Returns:
        The rows.

    Raises:
        UsageError: If another line is not a JSON object.
    """
    return _whole_lines(file)[0]


def read_object(file: Path) -> dict[str, Any] | None:
    """Read a file that holds one JSON object; None where it holds none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def append_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append whole lines in one write, or none of them, and see them onto the disk; a last line that a kill cut off goes.

    Args:
        file: The file; it and its folder are made where needed.
        rows: One JSON object a line; NaN and infinity are refused by the writer.

    Raises:
        OSError: If the disk is full; the rows of the file are then as they were.
        UsageError: As `read_rows`, if the last line does not end.
    """
    text = "".join(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in rows).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file, os.O_RDWR | os.O_APPEND | os.O_CREAT) as handle:
        if _lacks_its_end(handle):
            size = _whole_lines(file)[1]
            if size == os.fstat(handle).st_size:
                text = b"\n" + text
            else:
                os.ftruncate(handle, size)
        written = os.write(handle, text)
        if written != len(text):
            os.ftruncate(handle, os.fstat(handle).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        os.fsync(handle)


def _lacks_its_end(handle: int) -> bool:
    if not os.fstat(handle).st_size:
        return False
    os.lseek(handle, -1, os.SEEK_END)
    return os.read(handle, 1) != b"\n"


def replace_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file of JSON lines: whole, or not at all."""
    with written_whole(file) as draft:
        append_rows(draft, rows)


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Give a path that becomes ``file`` when it is written; after an error it is gone and ``file`` as before."""
    draft = file.with_name(f".{file.name}.tmp")
    draft.unlink(missing_ok=True)
    try:
        yield draft
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _alone(file: Path, flags: int) -> Iterator[int]:
    """Open a file, and wait for other processes to be done with it; not on Windows or a disk without locks."""
    handle = os.open(file, flags, 0o644)
    try:
        if sys.platform != "win32":
            import fcntl

            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)  # which ends the lock


def _whole_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file's whole lines, and how many bytes these take; a row is whole as soon as it can be read."""
    rows: list[dict[str, Any]] = []
    size = 0
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines) or line.endswith(b"\n") or not line.startswith(b"{"):
            raise UsageError(f"{file}, line {number}: not a JSON object: delete the file, or mend the line")
        else:
            break
        size += len(line)
    return rows, size
