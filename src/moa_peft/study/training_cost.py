# ruff: noqa: ARG002  # a callback of the trainer is given more than it needs
"""How long the steps of a training run took, kept on the disk."""

import statistics
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moa_peft.json_lines import append_rows, read_rows
from moa_peft.study.rows import StepTime
from moa_peft.training.progress import StepClock


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
