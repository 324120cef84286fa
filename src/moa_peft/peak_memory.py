"""The most memory that a piece of work holds."""

import re
from contextlib import suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class PeakMemory:
    """The most memory held from now on, in 2**20 bytes.

    Args:
        cuda: Whether of what torch allocates on the GPU; else of the resident set of the process. Some systems cannot forget the
            peak of what ran in the process before: there `mib` tells a peak only if it is a new one.
    """

    def __init__(self, *, cuda: bool) -> None:
        self._cuda = cuda
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before_mib: float | None = torch.cuda.memory_allocated() / 2**20
            return
        with suppress(OSError):
            if _RESET.exists():
                _RESET.write_text("5")  # proc(5): sets the peak of the resident set to what it is now
        now, self._old_peak = _status_mib("VmRSS"), _status_mib("VmHWM")
        self.before_mib = now
        if now is not None and self._old_peak is not None and self._old_peak <= 1.01 * now:
            self._old_peak = 0.0

    def mib(self) -> float | None:
        """The peak so far; None where the system does not tell it."""
        if self._cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        peak = _status_mib("VmHWM")
        return peak if peak is not None and self._old_peak is not None and peak > self._old_peak else None


def _status_mib(field: str) -> float | None:
    found = (
        re.search(rf"^{field}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE) if _STATUS.exists() else None
    )
    return None if found is None else int(found.group(1)) / 1024
