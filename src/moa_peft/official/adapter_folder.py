"""Where an adapter that is made of another one is written: whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moa_peft.errors import UsageError
from moa_peft.folder_lock import LOCK_FILE, claimed
from moa_peft.provenance import RECIPE_FILE
from moa_peft.training.output_folder import ADAPTER_CONFIG, DRAFT, disk_errors_named, replacing, sweep

_REPLACED = (
    "adapter_model*", "config.json", "generation_config.json", "processor_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "*chat_template*",
)  # fmt: skip
"""Files of an adapter's folder that are read with it; those of the old one do not stay beside a new one."""


def check_folder(out: Path, *, overwrite: bool) -> None:
    """Check that an adapter may be written to a folder, which need not exist, before any work is done for it.

    Raises:
        UsageError: If it is a file, or holds anything but an adapter that may be replaced.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"--out {out} is a file: choose a folder")
    drafts = list(out.glob(f"{DRAFT}*"))  # of a command that was killed, perhaps while the files moved
    if {one.name for one in out.iterdir()} <= {LOCK_FILE, *(one.name for one in drafts)}:
        return
    if (out / RECIPE_FILE).exists():
        raise UsageError(f"--out {out} holds a training run: choose another folder")
    if not (out / ADAPTER_CONFIG).is_file() and not drafts:
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
    """Give a temporary folder whose files become the adapter in ``out`` when all are written.

    Yields:
        The folder to write into. After an error it is gone and ``out`` as before.

    Raises:
        UsageError: As `check_folder`, or if another process writes there.
        OSError: If the disk is full or closed.
    """
    with claimed(out):
        check_folder(out, overwrite=overwrite)
        sweep(out)
        with disk_errors_named(out), replacing(out, gone=_REPLACED) as draft:
            yield draft


def check_file(out: Path, *, overwrite: bool) -> None:
    """Check that a file may be written, before any work is done for it.

    Raises:
        UsageError: If ``out`` is a folder, or is there and may not be replaced.
    """
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder: give a file, as in {out}/adapter.pth")
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out} exists: choose another file, or add --overwrite to replace it")
