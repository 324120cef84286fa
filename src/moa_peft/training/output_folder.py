"""The folder of a run: its files are complete or absent at any moment."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moa_peft.errors import UsageError
from moa_peft.folder_lock import LOCK_FILE
from moa_peft.json_lines import read_object, written_whole
from moa_peft.provenance import RECIPE_FILE

ADAPTER_CONFIG = "adapter_config.json"
DRAFT = ".adapter-"
"""What the name of a temporary folder begins with."""


def check_unused(output_dir: Path) -> None:
    """Check that a new run may write into a folder.

    Args:
        output_dir: The folder, held by `moa_peft.folder_lock.claimed`.

    Raises:
        UsageError: If it holds anything but the recipe of a start that failed.
    """
    if any(one.name not in (RECIPE_FILE, LOCK_FILE) for one in output_dir.iterdir()):
        raise UsageError(
            f"output_dir {output_dir} exists and is not empty: choose another one, delete it, or add --resume to go "
            "on with the run in it"
        )


def sweep(output_dir: Path) -> None:
    """Remove what a killed run was writing: drafts of files and of the adapter."""
    for draft in output_dir.glob(".*.tmp"):
        draft.unlink(missing_ok=True)
    for draft in output_dir.glob(f"{DRAFT}*"):
        shutil.rmtree(draft, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with written_whole(file) as draft:
        draft.write_text(text, encoding="utf-8")


def read_recipe(output_dir: Path) -> dict[str, Any]:
    """Read the recipe of the run in a folder.

    Raises:
        UsageError: If the folder holds none.
    """
    recipe = read_object(output_dir / RECIPE_FILE)
    if recipe is None:
        raise UsageError(
            f"{output_dir} holds no readable {RECIPE_FILE}, so there is no run to resume: leave --resume out"
        )
    return recipe


@contextmanager
def replacing(output_dir: Path, gone: Iterable[str] = ()) -> Iterator[Path]:
    """Give a temporary folder whose files move into another folder when all of them are written.

    PEFT takes a folder for an adapter when it holds an `adapter_config.json`: an old one goes first and the new one
    comes last, so an adapter is there whole or not at all.

    Args:
        output_dir: That folder.
        gone: Patterns of files of an old adapter that do not stay beside the new one.

    Yields:
        The folder to write into. After an error in there it is gone and the other folder as before.
    """
    draft = Path(tempfile.mkdtemp(dir=output_dir, prefix=DRAFT))
    try:
        yield draft
        (output_dir / ADAPTER_CONFIG).unlink(missing_ok=True)
        for pattern in gone:
            for old in output_dir.glob(pattern):
                _remove(old)
        for file in sorted(draft.iterdir(), key=lambda one: one.name == ADAPTER_CONFIG):
            old = output_dir / file.name
            if old.is_dir():  # a tokenizer's further chat templates: not replaced while it holds files
                _remove(old)
            file.replace(old)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def disk_errors_named(folder: Path) -> Iterator[None]:
    """Turn what the writers of weights raise on a full or closed disk into an `OSError` with its number.

    safetensors and tokenizers state the number in their messages; torch's writer raises a bare `RuntimeError`, so there the free
    space decides. Use it around writing alone.

    Args:
        folder: Where is written to; named in the error.

    Raises:
        OSError: Instead of such an error. Any other passes.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # tokenizers raises no other kind
        stated = re.search(r"os error (\d+)", str(error))
        is_full = isinstance(error, RuntimeError) and free_bytes(folder) <= 2**20
        if stated is None and not is_full:
            raise
        number = errno.ENOSPC if stated is None else int(stated[1])
        raise OSError(number, os.strerror(number), str(folder)) from error


def free_bytes(folder: Path) -> int:
    """The free space where a folder lies."""
    return shutil.disk_usage(folder).free
