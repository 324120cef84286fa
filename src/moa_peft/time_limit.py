"""A limit on what runs code that others wrote: templates and patterns may never end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from moa_peft.errors import UsageError


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """End the block after a while. Only Python's main thread can be interrupted, and not on Windows: elsewhere it may run on.

    Args:
        seconds: How long it may take; it must be in Python code, or in C code that looks for signals, as `re` does.
        what: What runs, for the error.

    Raises:
        UsageError: If it has not ended.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise UsageError(f"{what} has not ended after {seconds:g} s: use another one")

    before = signal.signal(signal.SIGALRM, stop)
    rest, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, rest, interval)
        signal.signal(signal.SIGALRM, before)
