"""The user's cache: folders made once by one process at a time, with a manifest that shows whether they are whole."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moa_peft.data.progress import say
from moa_peft.errors import UsageError
from moa_peft.json_lines import read_object

MANIFEST = "moa_manifest.json"
"""Name of the file that is written last into a cached folder: what it was made from, sizes and SHA-256 of its files."""

_NO_ACCESS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def cache_root() -> Path:
    """The folder of everything that is fetched or made once: `$MOA_CACHE`, or moa-peft in the user's cache."""
    chosen = os.environ.get("MOA_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    users = os.environ.get("XDG_CACHE_HOME")
    return (Path(users) if users else Path.home() / ".cache") / "moa-peft"


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process at a time work under a name in the cache; the others wait and say so.

    Raises:
        UsageError: If the cache cannot be written to, here or in the body.
    """
    from filelock import FileLock, Timeout

    root = cache_root()
    try:
        (root / ".locks").mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".locks" / f"{name}.lock")
        try:
            lock.acquire(timeout=2)
        except Timeout:
            say(f"another process is preparing {name}: waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
    except OSError as error:
        if error.errno not in _NO_ACCESS:
            raise
        raise UsageError(
            f"the cache folder {root} cannot be written to ({error.strerror}): "
            "set MOA_CACHE to a folder with room where you may write"
        ) from error


@contextmanager
def draft_folder(name: str, *, needs_bytes: int) -> Iterator[Path]:
    """Give an empty folder on the disk of the cache to work in; call it under the lock of the same name.

    Args:
        name: What is being made; what a killed process left under this name is removed first.
        needs_bytes: Room that the work takes.

    Yields:
        The folder, gone afterwards unless it was renamed.

    Raises:
        UsageError: If the disk lacks the room.
    """
    root = cache_root()
    for left in root.glob(f".draft-{name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(root).free
    if free < needs_bytes:
        raise UsageError(
            f"preparing {name} takes {needs_bytes // 10**6} MB and the disk of the cache folder {root} has "
            f"{free // 10**6} MB free: make room, or set MOA_CACHE to a folder on another disk"
        )
    draft = Path(tempfile.mkdtemp(dir=root, prefix=f".draft-{name}-"))
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def cached_folder(
    name: str, *, source: Mapping[str, Any], build: Callable[[Path], None], needs_bytes: int
) -> Path:
    """Give a folder of the cache, made now if it is not there whole.

    Args:
        name: Its name below the cache's root.
        source: What it is made from, JSON values; a folder made from anything else is made again.
        build: Fills the empty folder it is given.
        needs_bytes: Room that building takes.

    Returns:
        The folder; every file in it has the size that it had when it was made.

    Raises:
        UsageError: If the cache cannot be written to or its disk is full.
    """
    folder = cache_root() / name
    if folder.exists() and folder_problem(folder, source) is None:
        return folder
    with locked(name):
        problem = folder_problem(folder, source) if folder.exists() else "absent"
        if problem is None:  # another process made it in the meantime
            return folder
        if problem != "absent":
            say(f"the cached folder {folder} is not whole ({problem}): making it again")
        with draft_folder(name, needs_bytes=needs_bytes) as draft:
            made = draft / "made"
            made.mkdir()
            build(made)
            _write_manifest(made, source)
            if folder.exists():
                folder.rename(draft / "old")
            made.rename(folder)
    return folder


def folder_problem(folder: Path, source: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a cached folder.

    Args:
        folder: The folder.
        source: What it should have been made from.

    Returns:
        The first fault found, or None if the folder is whole.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} is missing or unreadable"
    if manifest["source"] != dict(source):
        return "it was made from something else"
    for name, stated in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != stated["size"]:
            return f"{name} has {file.stat().st_size} bytes, not {stated['size']}"
    return None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a cached folder; None if there is none that can be read."""
    manifest = read_object(folder / MANIFEST) or {}
    return manifest if {"source", "files"} <= manifest.keys() else None


def _write_manifest(folder: Path, source: Mapping[str, Any]) -> None:
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    (folder / MANIFEST).write_text(
        json.dumps({"source": dict(source), "files": files}, indent=2) + "\n", "utf-8"
    )
