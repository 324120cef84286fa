"""What a study has found so far, taken from its rows: the input of tables and plots."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from moa_peft.study.config import FROZEN, StudyConfig
from moa_peft.study.data import VALIDATION
from moa_peft.study.estimates import Difference, Estimate, Values, difference, estimate, mean_value
from moa_peft.study.rows import RunRow, Scores, Stage
from moa_peft.study.schedule import (
    Run,
    choose_rates,
    final_runs,
    run_hash,
    tried_rates,
    tuning_runs,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodSummary:
    """One method with the learning rate chosen for it, over its seeds."""

    label: str
    rows: tuple[RunRow, ...]
    """Its finished runs, one a seed."""
    tests: Mapping[str, Estimate]
    """Accuracy of each test that all of them have: mean over seeds; of the frozen model its error is over questions."""
    mean: Estimate | None
    """Mean accuracy over the tests that have one; None while one is missing."""
    versus: Difference | None
    """Mean difference from the baseline; None for the baseline, and while there is no common seed."""
    versus_by_test: Mapping[str, Difference]
    """The same for each test."""
    losses: Mapping[str, Estimate]
    """Loss of the answers of each test that all of them have, nats a token; the error as that of ``tests``."""
    losses_versus: Mapping[str, Difference]
    """Difference of that loss from the baseline's, test by test."""
    forgetting: Mapping[str, Difference]
    """Accuracy less the frozen model's, of each task that tells what training took away; 0 for that model itself."""
    forgetting_mean: Difference | None
    """The same over all these tasks; None while one is missing."""
    forgetting_versus: Difference | None
    """The mean accuracy on these tasks less the baseline's; None for the baseline, and while one is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The learning rate that was chosen for a method, and how it did on the validation rows."""

    rates: Sequence[float]
    """Those that were tried, the lowest first."""
    rate: float
    """The one chosen."""
    rows: tuple[RunRow, ...]
    """Its runs, one a tuning seed."""
    loss: Estimate
    """Loss of the validation answers, over tuning seeds; of one seed with the error of its questions."""
    versus: Difference | None
    """Its difference from the baseline's choice, paired; None for the baseline, and where that has none."""

    @property
    def is_inside(self) -> bool:
        """Whether a lower and a higher rate were tried too, so that the list was long enough."""
        return min(self.rates) < self.rate < max(self.rates)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySummary:
    """What there is of a study, and what is missing."""

    config: StudyConfig
    tests: tuple[str, ...]
    """Names of its tests, in the config's order."""
    scored: tuple[str, ...]
    """Those of them that have an accuracy, or none so far because they are not done; the mean is over these."""
    forgetting: tuple[str, ...]
    """Names of the tasks that tell what training took away, likewise."""
    methods: tuple[MethodSummary, ...]
    """The frozen model, then the methods in their order; those with at least one run."""
    chosen: Mapping[str, float | None]
    """The learning rate of each method."""
    tuning: Mapping[tuple[str, float], tuple[RunRow | None, ...]]
    """The rows of each method and learning rate that was tried, seed by seed."""
    choices: Mapping[str, Choice]
    """By label, what tuning chose; those that are chosen."""
    failures: tuple[RunRow, ...]
    """Rows of runs that failed."""
    missing: tuple[str, ...]
    """What is not done, a phrase for each."""
    rows: tuple[RunRow, ...]
    """All rows that belong to the study."""
    planned: int
    """Runs of the whole study, the base model's and the learning rates to be tried included."""


def summarise(
    config: StudyConfig,
    shared: Mapping[str, Any],
    tests: Sequence[str],
    rows: Sequence[RunRow],
    forgetting: Sequence[str] = (),
) -> StudySummary:
    """Sum up a study.

    Args:
        config: The study.
        shared: From `shared_settings`.
        tests: Names of its tests; what rows have beside them is left out.
        rows: Rows of its folder; those of runs that the config does not name are left out.
        forgetting: Names of the tasks that tell what training took away.
    """
    found_rows = {(row.stage, row.config_hash): row for row in rows}

    def done(stage: Stage, run: Run) -> RunRow | None:
        row = found_rows.get((stage, run_hash(shared, run)))
        return None if row is None else dataclasses.replace(row, label=run.label)  # it may have had another

    chosen = choose_rates(config, shared, rows)
    tried = [(run, done("tuning", run)) for run in tuning_runs(config, tried_rates(config, shared, rows))]
    finals = [(run, done("final", run)) for run in final_runs(config, chosen)]
    tuning: dict[tuple[str, float], tuple[RunRow | None, ...]] = {}
    for run, row in tried:
        assert run.learning_rate is not None, "only methods are tuned"
        key = (run.label, run.learning_rate)
        tuning[key] = (*tuning.get(key, ()), row)
    found: dict[str, list[RunRow]] = {label: [] for label in (FROZEN, *config.labels())}
    broken: set[str] = set()  # methods that failed with a seed
    for run, row in finals:
        if row is not None and (row.failure is None or row.tests):
            found[run.label].append(row)
        elif row is not None:
            broken.add(run.label)
    scored = [
        name
        for name in tests
        if all(name in answers(row) for rows in found.values() for row in rows if name in row.tests)
    ]
    tasks = [*tests, *forgetting]
    finalists = config.finalist_labels()
    missing = [f"{run.name}, tried on validation rows" for run, row in tried if row is None]
    missing += [one for run, row in finals for one in _missing(run, row, tasks)]
    missing += [
        f"{label}, seed {seed}: no learning rate is chosen"
        for label in finalists
        for seed in config.seeds
        if chosen[label] is None
    ]
    used = tuple(row for _, row in (*tried, *finals) if row is not None)
    return StudySummary(
        config=config,
        tests=tuple(tests),
        scored=tuple(scored),
        forgetting=tuple(forgetting),
        methods=tuple(
            _method(label, found, broken, config.baseline, tests, scored, forgetting)
            for label, rows in found.items()
            if rows
        ),
        chosen=chosen,
        tuning=tuning,
        choices=_choices(config.baseline, chosen, tuning),
        failures=tuple(row for row in used if row.failed(tasks)),
        missing=tuple(missing),
        rows=used,
        planned=len(tried) + (1 + len(finalists) * len(config.seeds) if finalists else 0),
    )


def _choices(
    baseline: str,
    chosen: Mapping[str, float | None],
    tuning: Mapping[tuple[str, float], tuple[RunRow | None, ...]],
) -> dict[str, Choice]:
    rows = {
        label: tuple(row for row in tuning[label, rate] if row is not None)
        for label, rate in chosen.items()
        if rate is not None and (label, rate) in tuning
    }
    found: dict[str, Choice] = {}
    for label, some in rows.items():
        scores = [row.validation for row in some if row.validation is not None and row.validation.losses]
        rate = chosen[label]
        if len(scores) < len(some) or rate is None:  # rows of before losses were kept
            continue
        loss = estimate([statistics.fmean(one.losses) for one in scores])
        if len(scores) == 1:
            loss = dataclasses.replace(loss, error=scores[0].answer_loss_standard_error)
        pairs = [] if label == baseline else _pairs(some, rows.get(baseline, ()))
        found[label] = Choice(
            rates=sorted(rate for name, rate in tuning if name == label),
            rate=rate,
            rows=some,
            loss=loss,
            versus=_difference(_validation_losses, [VALIDATION], pairs),
        )
    return found


def _validation_losses(row: RunRow) -> Values:
    return {VALIDATION: row.validation.losses} if row.validation and row.validation.losses else {}


def answers(row: RunRow) -> Values:
    """The answers of a run by test, 1 for a right one; tests without scored questions are left out."""
    return {name: tuple(map(int, one.correct)) for name, one in row.tests.items() if one.correct}


def losses(row: RunRow) -> Values:
    """The losses of a run's answers by test; tests without a reference answer are left out."""
    return {name: one.losses for name, one in row.tests.items() if one.losses}


def devices(methods: Sequence[MethodSummary]) -> list[str]:
    """What the methods ran on; times of several tell the machines apart, and not the methods."""
    return sorted(
        {f"{row.device}, {row.threads} threads" for one in methods for row in one.rows if one.label != FROZEN}
    )


def median_step_ms(method: MethodSummary) -> float | None:
    """The median over seeds of the median time of a step."""
    times = [row.step_ms.median for row in method.rows if row.step_ms is not None]
    return statistics.median(times) if times else None


def _missing(run: Run, row: RunRow | None, tests: Sequence[str]) -> list[str]:
    if row is None:
        return [run.name]
    lacking = [name for name in tests if name not in row.tests]
    return [f"{run.name}: {', '.join(lacking)}"] if lacking and not row.failed(tests) else []


def _method(
    label: str,
    found: Mapping[str, Sequence[RunRow]],
    broken: Collection[str],
    baseline: str,
    tests: Sequence[str],
    scored: Sequence[str],
    forgetting: Sequence[str],
) -> MethodSummary:
    rows = found[label]
    pairs = [] if label == baseline else _pairs(rows, found[baseline])
    versus = partial(_difference, pairs=pairs, seed_failed=label in broken or baseline in broken)
    before = [(row, frozen) for row in rows for frozen in found[FROZEN]]
    forgotten = partial(_difference, answers, pairs=before, seed_failed=label in broken)
    by_test = _by_test(partial(_estimate, answers, rows=rows), scored)
    by_loss = _by_test(partial(_estimate, losses, rows=rows), tests)
    mean = _estimate(answers, scored, rows)
    if label == FROZEN:
        by_test, by_loss, mean = _with_question_errors(rows[0].tests, by_test, by_loss, mean)
    return MethodSummary(
        label=label,
        rows=tuple(rows),
        tests=by_test,
        mean=mean,
        versus=versus(answers, scored),
        versus_by_test=_by_test(partial(versus, answers), scored),
        losses=by_loss,
        losses_versus=_by_test(partial(versus, losses), tests),
        forgetting=_by_test(forgotten, forgetting),
        forgetting_mean=forgotten(forgetting),
        forgetting_versus=versus(answers, forgetting),
    )


def _with_question_errors(
    scores: Mapping[str, Scores],
    by_test: Mapping[str, Estimate],
    by_loss: Mapping[str, Estimate],
    mean: Estimate | None,
) -> tuple[dict[str, Estimate], dict[str, Estimate], Estimate | None]:
    """The frozen model's estimates with the errors of the questions: it has one run, so none over seeds."""
    tests = {
        name: dataclasses.replace(one, error=scores[name].standard_error) for name, one in by_test.items()
    }
    losses = {
        name: dataclasses.replace(one, error=scores[name].answer_loss_standard_error)
        for name, one in by_loss.items()
    }
    if mean is not None:
        errors = [one.error or 0.0 for one in tests.values()]
        mean = dataclasses.replace(mean, error=math.hypot(*errors) / len(errors))
    return tests, losses, mean


Read = Callable[[RunRow], Values]
Pairs = Sequence[tuple[RunRow, RunRow]]
Figure = TypeVar("Figure")


def _by_test(figure: Callable[[Sequence[str]], Figure | None], tests: Sequence[str]) -> dict[str, Figure]:
    """A figure of each test that has it."""
    return {name: one for name in tests if (one := figure([name])) is not None}


def _pairs(rows: Sequence[RunRow], baseline: Sequence[RunRow]) -> Pairs:
    """Rows of the same seed; the frozen model, which has none, with every seed."""
    return [(row, other) for row in rows for other in baseline if row.seed in (None, other.seed)]


def _estimate(read: Read, tests: Sequence[str], rows: Sequence[RunRow]) -> Estimate | None:
    """The mean over tests; None without a test, or where a row lacks one."""
    if not _have_all(read, rows, tests):
        return None
    return estimate([mean_value(_part(read(row), tests)) for row in rows])


def _difference(
    read: Read, tests: Sequence[str], pairs: Pairs, *, seed_failed: bool = False
) -> Difference | None:
    """The difference over tests; None without a pair or a test, or where a row lacks one."""
    if not pairs or not _have_all(read, [row for pair in pairs for row in pair], tests):
        return None
    values = [(_part(read(row), tests), _part(read(other), tests)) for row, other in pairs]
    return difference(values, seed_failed=seed_failed)


def _have_all(read: Read, rows: Sequence[RunRow], tests: Sequence[str]) -> bool:
    return bool(tests) and all(set(tests) <= read(row).keys() for row in rows)


def _part(values: Values, tests: Sequence[str]) -> Values:
    return {name: values[name] for name in tests}
