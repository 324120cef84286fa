"""One process at a time in a folder of results."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from moa_peft.errors import UsageError

LOCK_FILE = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder, so that no second process works in it; a kill gives it back. A process may claim its own again.

    Args:
        folder: Made where it is missing, with those above it, and removed again with them if nothing has been written into it.

    Raises:
        UsageError: If another process holds it, or it is not a folder.
        OSError: If it cannot be made or written to.
    """
    folder = folder.resolve()
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{folder} is not a folder: choose another one") from error
    lock = FileLock(folder / LOCK_FILE, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(
            f"another process works in {folder}: wait for it, or choose another folder"
        ) from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with contextlib.suppress(OSError):  # Windows deletes no open file; rmdir only an empty folder
                Path(lock.lock_file).unlink(missing_ok=True)
                for one in new:
                    one.rmdir()
        lock.release()
