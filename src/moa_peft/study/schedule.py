"""The runs of a study: which there are, which are done, and which come next.

``shared`` is everywhere what `shared_settings` gives, ``rows`` the results so far.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_peft.study.config import FROZEN, Method, StudyConfig
from moa_peft.study.rows import RunRow, Scores, Stage
from moa_peft.training.checkpoints import FREE_ON_RESUME
from moa_peft.training.recipe import Recipe, factors_of
from moa_peft.training.trainer_settings import trainer_fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One method with one learning rate and one seed; the base model has neither."""

    label: str
    """The method's label."""
    method: Method | None = None
    learning_rate: float | None = None
    seed: int | None = None
    rows: int | None = None
    """Training rows where they are fewer than the study's, as while learning rates are tried; None for those."""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        if self.learning_rate is None:
            return self.label
        rows = "" if self.rows is None else f"-rows{self.rows}"
        return f"{self.label}-lr{rate_text(self.learning_rate)}-seed{self.seed}{rows}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run that is to be done, as far as its stage asks."""

    run: Run
    stage: Stage
    """Whether the validation rows are enough, or tests follow."""
    tests: tuple[str, ...] = ()
    """Tests that are missing."""


def rate_text(rate: float) -> str:
    """A learning rate in words: short where that is the rate itself, so that no two rates read alike."""
    short = f"{rate:g}"
    return short if float(short) == rate else repr(rate)


def shared_settings(config: StudyConfig, train_md5: str, validation_md5: str) -> dict[str, Any]:
    """All that decides the runs of a study beside the method, the learning rate and the seed, by name.

    Where files and the model lie, how often is logged and saved, and what only the report reads is left out.
    """
    trainer = _deciding(config.trainer_of(Method(method="")))
    # the default is left out: older rows have it, and are known by these settings
    prompts = {} if config.router_prompts == 32 else {"router_prompts": config.router_prompts}
    return {
        "model": Path(config.model).name or config.model,  # its weights are compared by their fingerprint
        "template": config.template,
        "max_length": config.max_length,
        "train_limit": config.train_limit,
        "validation_limit": config.validation_limit,
        "test_limit": config.test_limit,
        "draw_seed": config.draw_seed,
        "train_md5": train_md5,
        "validation_md5": validation_md5,
        **({} if config.mode is None else {"mode": config.mode}),
        **prompts,
        **{f"trainer.{key}": value for key, value in trainer.items()},
    }


def method_settings(method: Method) -> dict[str, Any]:
    """All of a method's entry that decides its runs."""
    entry = {
        "method": method.method,
        "mixture": _as_json(method.mixture),
        "trainer": _deciding(method.trainer),
    }
    return entry | factors_of(method)


def run_hash(shared: Mapping[str, Any], run: Run) -> str:
    """Hash what decides a run, to 16 hexadecimal digits; its label and the tests are left out."""
    entry = None if run.method is None else method_settings(run.method)
    rows = [] if run.rows is None else [run.rows]
    text = json.dumps([shared, entry, run.learning_rate, run.seed, *rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recipe_of(config: StudyConfig, run: Run, *, data: str, data_md5: str | None, folder: str) -> Recipe:
    """Write the recipe of a run with a method, on training rows of a source and their MD5 where it is known, for its folder.

    Raises:
        UsageError: If a value is wrong.
    """
    assert run.method is not None, "the base model is not trained"
    settings = {
        "model": config.model,
        "data": data,
        "data_split": "train",
        "data_md5": data_md5,
        "limit": run.rows or config.train_limit,
        "output_dir": folder,
        "method": run.method.method,
        "mixture": _as_json(run.method.mixture),
        "template": config.template,
        "max_length": config.max_length,
        "seed": run.seed,
        **factors_of(run.method),
        **config.trainer_of(run.method),
        "learning_rate": run.learning_rate,
    }
    return Recipe.from_mapping(settings, trainer_fields())


def tuning_runs(config: StudyConfig, tried: Mapping[str, Sequence[float]] | None = None) -> list[Run]:
    """The runs that choose a learning rate for each method; none where there is nothing to choose.

    ``tried`` has the learning rates of each method by label, from `tried_rates`; None is those of the list.
    """
    tried = tried or {one.label: [float(rate) for rate in config.learning_rates] for one in config.methods}
    if not config.has_tuning:
        return []
    return [
        _tuning_run(config, one, rate, seed)
        for seed in config.tuning_seeds
        for one in config.methods
        for rate in tried[one.label]
    ]


def _tuning_run(config: StudyConfig, method: Method, rate: float, seed: int) -> Run:
    return Run(label=method.label, method=method, learning_rate=rate, seed=seed, rows=config.short_rows)


def tried_rates(
    config: StudyConfig, shared: Mapping[str, Any], rows: Sequence[RunRow]
) -> dict[str, list[float]]:
    """The learning rates of each method by label: the list's in its order, then those added while the choice lies at an end.

    A rate is added once all before it are done, up to ``most_rates``; none while several are equally good.
    """
    done = {row.config_hash: row for row in rows if row.stage == "tuning"}
    found: dict[str, list[float]] = {}
    for method in config.methods:
        rates = found[method.label] = [float(one) for one in config.learning_rates]
        while len(rates) < (config.most_rates or 0):
            best = _best_rates(config, shared, method, rates, done)
            if best not in ([min(rates)], [max(rates)]):  # nor of several that are equal
                break
            rates.append(best[0] / 2 if best[0] == min(rates) else best[0] * 2)
    return found


def _best_rates(
    config: StudyConfig,
    shared: Mapping[str, Any],
    method: Method,
    rates: Sequence[float],
    done: Mapping[str, RunRow],
) -> list[float]:
    """The best of the rates tried, the lowest of equals first; none while one is not done, or where all failed."""
    costs: dict[float, tuple[float, ...]] = {}
    for rate in sorted(rates):
        runs = [_tuning_run(config, method, rate, seed) for seed in config.tuning_seeds]
        rows = [done[one] for one in (run_hash(shared, run) for run in runs) if one in done]
        if len(rows) < len(runs):
            return []
        scores = [row.validation for row in rows if row.failure is None and row.validation is not None]
        figures = [one for score in scores if (one := _costs(config, score)) is not None]
        if len(figures) == len(rows):
            costs[rate] = tuple(map(statistics.fmean, zip(*figures, strict=True)))
    return [rate for rate, cost in costs.items() if cost == min(costs.values())]


def _costs(config: StudyConfig, score: Scores) -> tuple[float, ...] | None:
    """What chooses, less is better: of equal accuracies the loss, where there is one."""
    if config.choose_by == "answer_loss":
        return None if score.answer_loss is None else (score.answer_loss,)
    return None if score.accuracy is None else (-score.accuracy, score.answer_loss or 0.0)


def final_runs(config: StudyConfig, chosen: Mapping[str, float | None]) -> list[Run]:
    """The base model and every finalist with every seed, seed by seed, so that a part of a study is comparable.

    ``chosen`` has the learning rate of each method by label, from `choose_rates`; a method without one is left out. Without
    finalists nothing is run, not the base model either.
    """
    finalists = [one for one in config.methods if one.label in config.finalist_labels()]
    runs = [Run(label=FROZEN)] if finalists else []
    for seed in config.seeds:
        for one in finalists:
            rate = chosen.get(one.label)
            if rate is not None:
                runs.append(Run(label=one.label, method=one, learning_rate=rate, seed=seed))
    return runs


def possible_runs(config: StudyConfig, tried: Mapping[str, Sequence[float]]) -> list[Run]:
    """Every run of a method that the study may come to, whichever of the learning rates tried are chosen."""
    final = [
        Run(label=one.label, method=one, learning_rate=rate, seed=seed)
        for seed in dict.fromkeys((*config.tuning_seeds, *config.seeds))
        for one in config.methods
        for rate in tried[one.label]
    ]
    return list({run.name: run for run in (*tuning_runs(config, tried), *final)}.values())


def needs_training(config: StudyConfig, job: Job) -> bool:
    """Whether a job trains; the base model does not, nor does a tuning seed's run where tuning had as many rows."""
    if job.run.method is None:
        return False
    is_tuned = config.has_tuning and config.short_rows is None and job.run.seed in config.tuning_seeds
    return job.stage == "tuning" or not is_tuned


def choose_rates(
    config: StudyConfig, shared: Mapping[str, Any], rows: Sequence[RunRow]
) -> dict[str, float | None]:
    """Choose the learning rate of each method from the validation rows of its tuning runs.

    Returns:
        By label the rate with the best mean over the tuning seeds, of equal accuracies that with the lowest loss, the smallest of
        equals; one that failed with any of them is out. None while a tuning run is missing, or when all failed.
    """
    if not config.has_tuning:
        return dict.fromkeys(config.labels(), float(config.learning_rates[0]))
    done = {row.config_hash: row for row in rows if row.stage == "tuning"}
    tried = tried_rates(config, shared, rows)
    best = {one.label: _best_rates(config, shared, one, tried[one.label], done) for one in config.methods}
    return {label: rates[0] if rates else None for label, rates in best.items()}


def pending(
    runs: Sequence[Run],
    stage: Stage,
    rows: Sequence[RunRow],
    *,
    shared: Mapping[str, Any],
    tests: Sequence[str] = (),
    retry_failed: bool = False,
) -> list[Job]:
    """Find which runs of a stage are still to be done, with which tests; those that failed too where that is asked."""
    done = {row.config_hash: row for row in rows if row.stage == stage}
    jobs: list[Job] = []
    for run in runs:
        row = done.get(run_hash(shared, run))
        missing = tuple(name for name in tests if row is None or name not in row.tests)
        wanted = retry_failed if row is not None and row.failed(tests) else row is None or bool(missing)
        if wanted:
            jobs.append(Job(run=run, stage=stage, tests=missing))
    return jobs


def _deciding(trainer: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sorted(trainer.items()) if key not in FREE_ON_RESUME}


def _as_json(value: Any) -> Any:
    """The value as JSON has it: a file's numbers as keys become text."""
    return json.loads(json.dumps(value))
