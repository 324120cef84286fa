"""A study from its config to its rows: what is left is done, run after run, each row on the disk before the next."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_peft.folder_lock import claimed
from moa_peft.json_lines import RESULTS_FILE, append_rows
from moa_peft.provenance import command_line
from moa_peft.study.config import StudyConfig
from moa_peft.study.data import StudyData, load_data, questions_md5
from moa_peft.study.folder import check_run_folders, check_same_study, write_study
from moa_peft.study.methods import check_methods
from moa_peft.study.one_run import Order, execute, reads_bf16
from moa_peft.study.rows import RunRow, Stage, read_results
from moa_peft.study.schedule import (
    Job,
    choose_rates,
    final_runs,
    needs_training,
    pending,
    possible_runs,
    rate_text,
    run_hash,
    shared_settings,
    tried_rates,
    tuning_runs,
)

Pool = Callable[[Sequence[Order]], Iterator[tuple[Order, RunRow]]]
"""Does orders and gives each with its row as it ends."""


class StudyProgress:
    """Progress of a study: counts its runs and estimates the time left, as if each took as long as those done so far."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._begun = self._done = 0
        self._start = time.perf_counter()

    def begins(self, job: Job) -> str:
        """The line for a run that begins."""
        self._begun += 1
        what = "learning rate tried" if job.stage == "tuning" else f"{len(job.tests)} tests"
        return f"[{self._begun}/{max(self._total, self._begun)}] {job.run.name} ({what}), {self._times()}"

    def done(self, row: RunRow) -> str:
        """The line for a run that has ended."""
        self._done += 1
        return f"    {run_text(row)}; {self._done} of {max(self._total, self._done)} done, {self._times()}"

    def _times(self) -> str:
        elapsed = time.perf_counter() - self._start
        text = f"{duration(elapsed)} elapsed"
        if not self._done:
            return text
        return f"{text}, about {duration(elapsed / self._done * max(0, self._total - self._done))} left"


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A study whose config and rows are checked."""

    config: StudyConfig
    data: StudyData
    shared: dict[str, Any]
    """All that decides its runs beside method, learning rate and seed."""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return Path(self.config.out)

    @property
    def tests(self) -> dict[str, str]:
        """MD5 of the rows of each test."""
        return {one.name: questions_md5(one) for one in (*self.data.tests, *self.data.forgetting)}

    def check_folder(self, rows: Sequence[RunRow]) -> None:
        """Check that the folder holds nothing that other settings have made.

        Raises:
            UsageError: If it does.
        """
        tests, forgetting = ([one.name for one in part] for part in (self.data.tests, self.data.forgetting))
        check_same_study(
            self.folder, self.config, self.shared, rows, tests=tests, forgetting=forgetting, md5=self.tests
        )
        possible = possible_runs(self.config, tried_rates(self.config, self.shared, rows))
        check_run_folders(self.config, possible, self.data)

    def jobs(self, stage: str, rows: Sequence[RunRow], *, retry_failed: bool = False) -> list[Job]:
        """What is left of a stage."""
        if stage == "tuning":
            runs = tuning_runs(self.config, tried_rates(self.config, self.shared, rows))
            return pending(runs, "tuning", rows, shared=self.shared, retry_failed=retry_failed)
        runs = final_runs(self.config, choose_rates(self.config, self.shared, rows))
        names = list(self.tests)
        return pending(runs, "final", rows, shared=self.shared, tests=names, retry_failed=retry_failed)

    def orders(self, jobs: Sequence[Job], rows: Sequence[RunRow] = (), *, progress: bool) -> list[Order]:
        """What processes need to do jobs, beside the rows that there are."""
        whole = self.config.trainer.get("bf16", False)
        bases = {
            bool(row.trainer.get("bf16", whole)): row.base_fingerprint  # its weights differ with their dtype
            for row in reversed(rows)
            if row.base_fingerprint is not None
        }
        return [
            Order(
                config=self.config,
                data=self.data,
                job=one,
                config_hash=run_hash(self.shared, one.run),
                command=command_line(),
                base_fingerprint=bases.get(reads_bf16(self.config, one.run.method)),
                progress=progress,
            )
            for one in jobs
        ]


def open_study(config: StudyConfig) -> Study:
    """Check a study before its first run: methods, trainer, model, files, rows, and what its folder holds already.

    Raises:
        UsageError: If it cannot be run as asked.
    """
    check_methods(config)
    data = load_data(config)
    shared = shared_settings(config, data.train.md5, questions_md5(data.validation))
    study = Study(config=config, data=data, shared=json.loads(json.dumps(shared)))
    study.check_folder(read_results(study.folder))
    return study


def run_study(
    study: Study,
    *,
    pool: Pool | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: bool = True,
    retry_failed: bool = False,
) -> list[RunRow]:
    """Do what is left of a study.

    Args:
        study: From `open_study`.
        pool: Does the runs; None for one after the other in this process.
        say: Told what a person wants to know.
        progress: Show bars on standard error.
        retry_failed: Do runs again that failed.

    Returns:
        The rows of the study, those of earlier calls included. A run that failed has a row that says so.

    Raises:
        UsageError: If another process works in the folder, or has left there what other settings made.
        OtherBaseError: If the base model has not the weights that the rows of the study are of.
        OSError: If the disk is full.
    """
    with claimed(study.folder):
        rows = read_results(study.folder)
        study.check_folder(rows)  # another call may have worked here since the study was opened
        write_study(study.folder, study.config, study.shared, study.tests)
        study_progress = StudyProgress(sum(planned(study, rows, retry_failed=retry_failed).values()))
        stages: tuple[Stage, ...] = ("tuning", "final")
        for stage in stages:
            jobs, before = study.jobs(stage, rows, retry_failed=retry_failed), []
            while jobs != before:  # again: rates that were added, and tests of weights that were trained anew
                orders = study.orders(jobs, rows, progress=progress)
                for _, row in (pool or one_by_one(say, study_progress))(orders):
                    append_rows(study.folder / RESULTS_FILE, [dataclasses.asdict(row)])
                    say(study_progress.done(row))
                rows = read_results(study.folder)
                jobs, before = study.jobs(stage, rows), jobs
        return rows


def one_by_one(say: Callable[[str], None], study_progress: StudyProgress) -> Pool:
    """Do orders one after the other in this process."""

    def run(orders: Iterable[Order]) -> Iterator[tuple[Order, RunRow]]:
        for order in orders:
            say(study_progress.begins(order.job))
            yield order, execute(order)

    return run


def planned(study: Study, rows: Sequence[RunRow], *, retry_failed: bool = False) -> dict[str, int]:
    """Count what is left of a study beyond its rows.

    Returns:
        ``train``: runs to train; ``score``: runs that are trained already, or need no training; before the learning
        rates are chosen those of one tuning seed count as trained.
    """
    tuning = study.jobs("tuning", rows, retry_failed=retry_failed)
    config = study.config
    chosen = choose_rates(config, study.shared, rows)
    rates = {label: rate or float(config.learning_rates[0]) for label, rate in chosen.items()}
    undecided = {one.run.label for one in tuning}
    runs = [
        one
        for one in final_runs(config, rates)
        if chosen.get(one.label) is not None or one.label in undecided or one.method is None
    ]
    tests = list(study.tests)
    finals = pending(runs, "final", rows, shared=study.shared, tests=tests, retry_failed=retry_failed)
    score = [one for one in finals if not needs_training(config, one)]
    return {"train": len(tuning) + len(finals) - len(score), "score": len(score)}


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def run_text(row: RunRow) -> str:
    """The result of a run in one line."""
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
