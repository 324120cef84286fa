"""What a long step shows on standard error: a moving line on a terminal, one plain line elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def say(line: str) -> None:
    """Write one line to standard error, where it cannot mix with results."""
    sys.stderr.write(f"moa: {line}\n")
    sys.stderr.flush()


@contextmanager
def working(text: str, *, total_bytes: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show that a step is under way.

    Args:
        text: What is being done.
        total_bytes: How much there is to do; none shows the time alone.

    Yields:
        A function that takes the bytes done so far.
    """
    if not sys.stderr.isatty():
        say(text)
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    measured = [] if total_bytes is None else [BarColumn(), DownloadColumn()]
    columns = [SpinnerColumn(), TextColumn("{task.description}"), *measured, TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(text, total=total_bytes)
        yield lambda done: bar.update(task, completed=done)
