"""How far a study is, in words for a person."""

import statistics
import time
from collections.abc import Mapping

from moa_peft.compare.plan import Job
from moa_peft.compare.rows import RunRow


class Pace:
    """Counts runs and expects the time of the rest from those that this process has done.

    Args:
        planned: How many runs are to be trained ("train"), and how many only to be scored ("score").
    """

    def __init__(self, planned: Mapping[str, int]) -> None:
        self._left = dict(planned)
        self._total = sum(planned.values())
        self._begun = self._done = 0
        self._start = self._last = time.perf_counter()
        self._seconds: dict[str, list[float]] = {"train": [], "score": []}

    def begins(self, job: Job) -> str:
        """Say which run begins."""
        self._begun += 1
        self._last = time.perf_counter()
        what = "learning rate tried" if job.stage == "tuning" else f"{len(job.tests)} tests"
        return f"[{self._begun}/{max(self._total, self._begun)}] {job.run.name} ({what}), {self._times()}"

    def done(self, row: RunRow) -> str:
        """Say how a run ended."""
        self._done += 1
        now = time.perf_counter()
        kind = "train" if row.train_s and row.train_s <= now - self._last else "score"
        self._seconds[kind].append(now - self._last)
        self._left[kind] = max(0, self._left.get(kind, 0) - 1)
        self._last = now
        return f"    {_ended(row)}; {self._done} of {max(self._total, self._done)} done, {self._times()}"

    def _times(self) -> str:
        elapsed = time.perf_counter() - self._start
        known = {kind: statistics.fmean(times) for kind, times in self._seconds.items() if times}
        if any(count and kind not in known for kind, count in self._left.items()) and "train" not in known:
            return f"{duration(elapsed)} elapsed"
        rest = sum(count * known.get(kind, 0.0) for kind, count in self._left.items())
        return f"{duration(elapsed)} elapsed, about {duration(rest)} left"


def duration(seconds: float) -> str:
    """Write a time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _ended(row: RunRow) -> str:
    if row.failure is not None:
        return f"failed: {row.failure}"
    figures = []
    if row.validation is not None and row.validation.answer_loss is not None:
        figures.append(f"validation loss {row.validation.answer_loss:.4f}")
    shares = [one.accuracy for one in row.tests.values() if one.accuracy is not None]
    if shares:
        figures.append(f"mean accuracy {100 * statistics.fmean(shares):.1f} %")
    return ", ".join(figures) or "done"
