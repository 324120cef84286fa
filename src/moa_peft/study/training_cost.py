# ruff: noqa: ARG002  # a callback of the trainer is given more than it needs
"""What a training run costs: the time of its steps, kept on the disk, and the most memory it held."""

import re
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moa_peft.json_lines import append_rows, drop_torn_line, read_rows
from moa_peft.study.rows import StepTime
from moa_peft.training.progress import StepClock

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class StepLog(TrainerCallback):
    """Writes the times of the steps to a file at each checkpoint, so that a run cut off and resumed keeps them.

    Args:
        clock: Takes the times; it must be among the trainer's callbacks before this one.
        file: JSON lines: ``step``, ``seconds``, and ``warm``, which is False for the first step of a process.
    """

    def __init__(self, clock: StepClock, file: Path) -> None:
        self._clock, self._file, self._written = clock, file, 0

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what is new."""
        seconds = self._clock.seconds
        first = state.global_step - len(seconds) + 1
        rows = [
            {"step": first + place, "seconds": seconds[place], "warm": place > 0}
            for place in range(self._written, len(seconds))
        ]
        if rows:
            drop_torn_line(self._file)
            append_rows(self._file, rows)
        self._written = len(seconds)

    on_train_end = on_save


def step_time(file: Path) -> StepTime | None:
    """Quartiles of the times in what `StepLog` wrote, which need not exist; None for fewer than two steps that were warm."""
    by_step = {row["step"]: row for row in read_rows(file)}  # a step done twice counts as it was done last
    times = [1000 * row["seconds"] for row in by_step.values() if row["warm"]]
    if len(times) < 2:
        return None
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return StepTime(lower=lower, median=median, upper=upper, steps=len(times))


class PeakMemory:
    """The most memory held from now on, in 2**20 bytes.

    On a GPU what torch allocated; else the resident set of the process. Some systems cannot forget the peak of what ran
    in the process before: there `mib` tells a peak only if it is a new one.
    """

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):
            if _RESET.exists():
                _RESET.write_text("5")  # proc(5): sets the peak of the resident set to what it is now
        now, self._old_peak = _status_mib("VmRSS"), _status_mib("VmHWM")
        if now is not None and self._old_peak is not None and self._old_peak <= 1.01 * now:
            self._old_peak = 0.0

    def mib(self) -> float | None:
        """The peak so far; None where the system does not tell it."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20
        peak = _status_mib("VmHWM")
        return peak if peak is not None and self._old_peak is not None and peak > self._old_peak else None


def _status_mib(field: str) -> float | None:
    found = (
        re.search(rf"^{field}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE) if _STATUS.exists() else None
    )
    return None if found is None else int(found.group(1)) / 1024
