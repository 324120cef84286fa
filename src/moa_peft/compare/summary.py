"""What a study has found so far, taken from its rows: the input of tables and plots."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moa_peft.compare.config import FROZEN, StudyConfig
from moa_peft.compare.figures import Answers, Difference, Estimate, difference, estimate, mean_share, share
from moa_peft.compare.plan import (
    Run,
    choose_rates,
    final_runs,
    is_finalist,
    run_hash,
    tried_rates,
    tuning_runs,
)
from moa_peft.compare.rows import RunRow, Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodSummary:
    """One method with the learning rate chosen for it, over its seeds."""

    label: str
    """Its label."""
    rows: tuple[RunRow, ...]
    """Its finished runs, one a seed."""
    tests: Mapping[str, Estimate]
    """Accuracy of each test that all of them have: mean over seeds; of the frozen model its error is over questions."""
    mean: Estimate | None
    """Mean accuracy over all tests; None while one is missing."""
    versus: Difference | None
    """Mean difference from the baseline; None for the baseline, and while there is no common seed."""
    versus_by_test: Mapping[str, Difference]
    """The same for each test."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySummary:
    """What there is of a study, and what is missing."""

    config: StudyConfig
    """The study."""
    tests: tuple[str, ...]
    """Names of its tests, in the config's order."""
    methods: tuple[MethodSummary, ...]
    """The frozen model, then the methods in their order; those with at least one run."""
    chosen: Mapping[str, float | None]
    """The learning rate of each method."""
    tuning: Mapping[tuple[str, float], tuple[RunRow | None, ...]]
    """The rows of each method and learning rate that was tried, seed by seed."""
    failures: tuple[RunRow, ...]
    """Rows of runs that failed."""
    missing: tuple[str, ...]
    """What is not done, a phrase for each."""
    rows: tuple[RunRow, ...]
    """All rows that belong to the study."""
    planned: int
    """Runs of the whole study, the base model's and the learning rates to be tried included."""


def summarise(
    config: StudyConfig, shared: Mapping[str, Any], tests: Sequence[str], rows: Sequence[RunRow]
) -> StudySummary:
    """Sum up a study.

    Args:
        config: The study.
        shared: From `shared_settings`.
        tests: Names of its tests; what rows have beside them is left out.
        rows: Rows of its folder; those of runs that the config does not name are left out.

    Returns:
        The summary.
    """
    found_rows = {(row.stage, row.config_hash): row for row in rows}

    def done(stage: Stage, run: Run) -> RunRow | None:
        row = found_rows.get((stage, run_hash(shared, run)))
        return None if row is None else dataclasses.replace(row, label=run.label)  # it may have had another

    chosen = choose_rates(config, shared, rows)
    tuning: dict[tuple[str, float], tuple[RunRow | None, ...]] = {}
    missing: list[str] = []
    used: list[RunRow] = []
    tried = tuning_runs(config, tried_rates(config, shared, rows))
    for run in tried:
        assert run.learning_rate is not None, "only methods are tuned"
        row = done("tuning", run)
        key = (run.label, run.learning_rate)
        tuning[key] = (*tuning.get(key, ()), row)
        used += [row] if row is not None else []
        missing += [] if row is not None else [f"{run.name}, tried on validation rows"]
    finalists = [one.label for one in config.methods if is_finalist(config, one)]
    found: dict[str, list[RunRow]] = {label: [] for label in (FROZEN, *config.labels())}
    for run in final_runs(config, chosen):
        row = done("final", run)
        used += [row] if row is not None else []
        missing += _missing(run, row, tests)
        if row is not None and (row.failure is None or row.tests):
            found[run.label].append(row)
    missing += [
        f"{label}, seed {seed}: no learning rate is chosen"
        for label in config.labels()
        for seed in config.seeds
        if chosen[label] is None and label in finalists
    ]
    return StudySummary(
        config=config,
        tests=tuple(tests),
        methods=tuple(
            _method(label, some, found, config.baseline, tests) for label, some in found.items() if some
        ),
        chosen=chosen,
        tuning=tuning,
        failures=tuple(row for row in used if row.failed(tests)),
        missing=tuple(missing),
        rows=tuple(used),
        planned=len(tried) + 1 + len(finalists) * len(config.seeds),
    )


def answers(row: RunRow) -> Answers:
    """The answers of a run by test; tests without scored questions are left out."""
    return {name: one.correct for name, one in row.tests.items() if one.correct}


def median_step_ms(method: MethodSummary) -> float | None:
    """The median over seeds of the median time of a step."""
    times = [row.step_ms.median for row in method.rows if row.step_ms is not None]
    return statistics.median(times) if times else None


def _missing(run: Run, row: RunRow | None, tests: Sequence[str]) -> list[str]:
    if row is None:
        return [f"{run.name}"]
    lacking = [name for name in tests if name not in row.tests]
    return [f"{run.name}: {', '.join(lacking)}"] if lacking and not row.failed(tests) else []


def _method(
    label: str,
    rows: Sequence[RunRow],
    found: Mapping[str, Sequence[RunRow]],
    baseline: str,
    tests: Sequence[str],
) -> MethodSummary:
    whole = [name for name in tests if all(name in answers(row) for row in rows)]
    by_test = {name: estimate([share(answers(row)[name]) for row in rows]) for name in whole}
    mean = estimate([mean_share(_part(row, tests)) for row in rows]) if len(whole) == len(tests) else None
    if label == FROZEN:  # one run: its error is that of the questions
        by_test = {
            name: Estimate(mean=one.mean, error=rows[0].tests[name].standard_error)
            for name, one in by_test.items()
        }
        errors = [one.error or 0.0 for one in by_test.values()]
        mean = None if mean is None else Estimate(mean=mean.mean, error=math.hypot(*errors) / len(errors))
    pairs = [] if label == baseline else _pairs(rows, found[baseline])
    common = [name for name in whole if all(name in answers(other) for _, other in pairs)] if pairs else []
    return MethodSummary(
        label=label,
        rows=tuple(rows),
        tests=by_test,
        mean=mean,
        versus=_difference(pairs, tests) if pairs and len(common) == len(tests) else None,
        versus_by_test={name: _difference(pairs, [name]) for name in common},
    )


def _pairs(rows: Sequence[RunRow], baseline: Sequence[RunRow]) -> list[tuple[RunRow, RunRow]]:
    """Rows of the same seed; the frozen model, which has none, with every seed."""
    return [(row, other) for row in rows for other in baseline if row.seed in (None, other.seed)]


def _difference(pairs: Sequence[tuple[RunRow, RunRow]], tests: Sequence[str]) -> Difference:
    return difference([(_part(row, tests), _part(other, tests)) for row, other in pairs])


def _part(row: RunRow, tests: Sequence[str]) -> Answers:
    return {name: answers(row)[name] for name in tests}
