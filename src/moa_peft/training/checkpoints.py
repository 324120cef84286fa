"""Which checkpoints of a run are whole.

A checkpoint is a folder of several files, and a run may be killed between any two of them. So a manifest of the
folder's files and sizes is written last; a folder without one, or that differs from it, was cut off.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moa_peft.errors import UsageError

MANIFEST = "complete.json"
_NAME = re.compile(r"checkpoint-([0-9]+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """The checkpoints of a run, oldest first."""

    complete: tuple[Path, ...]
    """Folders with all the files that their manifest names."""

    incomplete: tuple[Path, ...]
    """Folders that were being written, or deleted, when the run ended."""


def find_checkpoints(output_dir: Path) -> Checkpoints:
    """Sort the checkpoints of a run into complete and incomplete ones.

    Args:
        output_dir: The run's folder; it need not exist.

    Returns:
        Both kinds, by step.
    """
    found = [one for one in output_dir.glob("checkpoint-*") if _NAME.fullmatch(one.name) and one.is_dir()]
    found.sort(key=step_of)
    whole = {one: is_complete(one) for one in found}
    return Checkpoints(
        complete=tuple(one for one in found if whole[one]),
        incomplete=tuple(one for one in found if not whole[one]),
    )


def step_of(checkpoint: Path) -> int:
    """The number of optimiser steps that a checkpoint's name states."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match, f"not a checkpoint: {checkpoint}"
    return int(match.group(1))


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder holds every file of its manifest, each of the size stated there."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["sizes"]
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def mark_complete(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint whose files are all written. The files reach the disk before it does.

    Args:
        checkpoint: The folder.
    """
    files = sorted(one for one in checkpoint.rglob("*") if one.is_file() and one.name != MANIFEST)
    for one in files:
        _flush(one)
    sizes = {one.relative_to(checkpoint).as_posix(): one.stat().st_size for one in files}
    draft = checkpoint / f".{MANIFEST}"
    draft.write_text(json.dumps({"sizes": sizes}, indent=1) + "\n", encoding="utf-8")
    _flush(draft)
    draft.replace(checkpoint / MANIFEST)


def unmark(checkpoint: Path) -> None:
    """Take the manifest away: the folder is about to be written anew, or deleted."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)


def prune(output_dir: Path, keep: int | None, spare: str | None = None) -> None:
    """Delete old checkpoints. Call it once the newest one is complete, so that one is left at any moment.

    Args:
        output_dir: The run's folder.
        keep: Complete checkpoints to keep, the newest ones, at least 1; None keeps all.
        spare: One more to keep, as the best of a run; None for none.
    """
    if keep is None:
        return
    found = find_checkpoints(output_dir)
    for one in [*found.complete[: -max(keep, 1)], *found.incomplete]:
        if spare is None or one.resolve() != Path(spare).resolve():
            unmark(one)  # cut off in the middle of its deletion, it must not pass as complete
            shutil.rmtree(one)


def choose(output_dir: Path, resume: bool | str) -> Path | None:
    """Choose the checkpoint to go on from.

    Args:
        output_dir: The run's folder.
        resume: True for the last complete one, or the path of one in that folder.

    Returns:
        The checkpoint's folder; None when the run was cut off before its first one was complete, so that it starts
        over.

    Raises:
        UsageError: If the one named is not a complete checkpoint of this run.
    """
    complete = find_checkpoints(output_dir).complete
    if isinstance(resume, str):
        wanted = [one for one in complete if one.resolve() == Path(resume).resolve()]
        if not wanted:
            known = f"complete are {names(complete)}" if complete else "it has none"
            raise UsageError(f"{resume} is not a complete checkpoint of the run in {output_dir}: {known}")
        return wanted[0]
    return complete[-1] if complete else None


def names(checkpoints: Sequence[Path]) -> str:
    """The folders' names, for a message."""
    return ", ".join(one.name for one in checkpoints)


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
