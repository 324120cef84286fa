"""How far a study is, in words for a person."""

import statistics
import time
from collections.abc import Mapping

from moa_peft.study.rows import RunRow
from moa_peft.study.schedule import Job, rate_text


class Pace:
    """Counts runs and expects the time of the rest from those that this process has seen.

    Args:
        planned: How many runs are to be trained ("train"), and how many only to be scored ("score").
        at_once: How many are done at the same time.
    """

    def __init__(self, planned: Mapping[str, int], *, at_once: int = 1) -> None:
        self._left, self._at_once = dict(planned), at_once
        self._total = sum(planned.values())
        self._begun = self._done = 0
        self._start = time.perf_counter()
        self._seconds: dict[str, list[float]] = {"train": [], "score": []}

    def begins(self, job: Job) -> str:
        """Say which run begins."""
        self._begun += 1
        what = "learning rate tried" if job.stage == "tuning" else f"{len(job.tests)} tests"
        return f"[{self._begun}/{max(self._total, self._begun)}] {job.run.name} ({what}), {self._times()}"

    def done(self, row: RunRow, *, needs_training: bool) -> str:
        """Say how a run ended.

        Args:
            row: Its row.
            needs_training: Whether it was to be trained.
        """
        self._done += 1
        kind = "train" if needs_training else "score"
        if row.failure is None:
            trained = (row.train_s or 0.0) if needs_training else 0.0
            self._seconds[kind].append(trained + (row.evaluate_s or 0.0))
        self._left[kind] = max(0, self._left.get(kind, 0) - 1)
        return f"    {run_text(row)}; {self._done} of {max(self._total, self._done)} done, {self._times()}"

    def _times(self) -> str:
        elapsed = f"{duration(time.perf_counter() - self._start)} elapsed"
        known = {kind: statistics.fmean(times) for kind, times in self._seconds.items() if times}
        if any(count and kind not in known for kind, count in self._left.items()):
            return elapsed  # nothing like what is left has been done yet
        rest = sum(count * known[kind] for kind, count in self._left.items() if count)
        return f"{elapsed}, about {duration(rest / self._at_once)} left"


def duration(seconds: float) -> str:
    """Write a time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def run_text(row: RunRow) -> str:
    """Say what a run gave."""
    rate = "" if row.learning_rate is None else f"-lr{rate_text(row.learning_rate)}-seed{row.seed}"
    if row.failure is not None:
        return f"{row.label}{rate} failed: {row.failure}"
    figures = []
    if row.validation is not None and row.validation.answer_loss is not None:
        figures.append(f"validation loss {row.validation.answer_loss:.4f}")
    shares = [one.accuracy for one in row.tests.values() if one.accuracy is not None]
    if shares:
        figures.append(f"mean accuracy {100 * statistics.fmean(shares):.1f} %")
    return f"{row.label}{rate}: {', '.join(figures) or 'done'}"
