"""Where an adapter that is made of another one is written: whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moa_peft.errors import UsageError
from moa_peft.provenance import RECIPE_FILE
from moa_peft.training.output_folder import ADAPTER_CONFIG, disk_errors_named, replacing


def check_folder(out: Path, *, overwrite: bool) -> None:
    """Check that an adapter may be written to a folder, which need not exist, before any work is done for it.

    Raises:
        UsageError: If it is a file, or holds anything but an adapter that may be replaced.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"--out {out} is a file: choose a folder")
    if not any(out.iterdir()):
        return
    if (out / RECIPE_FILE).exists():
        raise UsageError(f"--out {out} holds a training run: choose another folder")
    if not (out / ADAPTER_CONFIG).is_file():
        raise UsageError(f"--out {out} is not empty and holds no adapter: choose another folder")
    if not overwrite:
        raise UsageError(
            f"--out {out} holds an adapter: choose another folder, or add --overwrite to replace it"
        )


def check_apart(out: Path, adapter: Path) -> None:
    """Check that what is made of an adapter is not written into that adapter's own folder, where it would replace a part of it.

    Raises:
        UsageError: If it is.
    """
    if out.resolve().is_relative_to(adapter.resolve()):
        raise UsageError(
            f"--out {out} lies in the folder of the adapter itself, {adapter}: choose another place"
        )


@contextmanager
def adapter_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder that becomes ``out`` when its files are written; in an old one the adapter is replaced.

    Yields:
        The folder to write into. After an error it is gone and ``out`` as before.

    Raises:
        UsageError: As `check_folder`.
        OSError: If the disk is full or closed.
    """
    out = out.absolute()  # "." has no name
    check_folder(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() and any(out.iterdir()):
        with disk_errors_named(out), replacing(out) as draft:
            yield draft
        return
    around = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        draft = around / out.name
        draft.mkdir()
        with disk_errors_named(out.parent):
            yield draft
        draft.replace(out)
    finally:
        shutil.rmtree(around, ignore_errors=True)


def check_file(out: Path, *, overwrite: bool) -> None:
    """Check that a file may be written, before any work is done for it.

    Raises:
        UsageError: If ``out`` is a folder, or is there and may not be replaced.
    """
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder: give a file, as in {out}/adapter.pth")
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out} exists: choose another file, or add --overwrite to replace it")
