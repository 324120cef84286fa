"""What makes the runs of a study comparable."""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moa_peft.errors import UsageError
from moa_peft.evaluation.loading import load
from moa_peft.evaluation.result_key import identify
from moa_peft.study.config import StudyConfig
from moa_peft.study.one_run import Order, step_time, train_once
from moa_peft.study.report import read_summary
from moa_peft.study.runner import Study, open_study, run_study
from moa_peft.study.schedule import Job, Run
from moa_peft.training.trainer import AdapterTrainer
from tiny_lm import save_hub
from tiny_study import write_forgetting, write_study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return open_study(StudyConfig.from_mapping({**write_study(tmp_path), "train_limit": 24}))


@pytest.fixture
def rows_seen(study: Study, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """The tokens of each batch of a run, in order."""
    step, seen = AdapterTrainer.training_step, []

    def watched(self: AdapterTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", watched)

    def run(method: int, rate: float, seed: int) -> list[Any]:
        seen.clear()
        one = study.config.methods[method]
        job = Job(run=Run(label=one.label, method=one, learning_rate=rate, seed=seed), stage="tuning")
        (order,) = study.orders([job], progress=False)
        assert isinstance(order, Order)
        train_once(order)
        return list(seen)

    return run


@pytest.mark.slow
def test_methods_and_rates_meet_the_same_rows_in_the_same_order_and_seeds_do_not(
    rows_seen: Callable[..., list[Any]],
) -> None:
    soft = rows_seen(0, 0.01, 3)
    assert len(soft) == 3
    assert rows_seen(1, 0.1, 3) == soft
    other = rows_seen(1, 0.01, 4)
    assert other != soft
    assert sorted(row for batch in other for row in unpadded(batch)) == sorted(
        row for batch in soft for row in unpadded(batch)
    )


def unpadded(batch: list[list[int]]) -> list[str]:
    return [bytes(token % 256 for token in row).rstrip(b"\x00").hex() for row in batch]


def test_the_time_of_a_step_leaves_out_the_first() -> None:
    assert step_time([9.0, 0.1]) is None
    found = step_time([9.0, 0.1, 0.2, 0.4])
    assert found is not None
    assert (found.lower, found.median, found.upper) == pytest.approx((150, 200, 300))
    assert found.steps == 3


@pytest.mark.slow
def test_forgetting_is_zero_for_the_frozen_model_and_its_tasks_are_scored_by_the_texts(
    study: Study, tmp_path: Path
) -> None:
    write_forgetting(tmp_path)
    changes = {
        "learning_rates": (0.5,),
        "seeds": (0,),
        "tasks": "mix",
        "mode": "likelihood",
        "forgetting": "piqa",
    }
    config = dataclasses.replace(study.config, **changes, train_limit=16, validation_limit=5)
    rows = run_study(open_study(config), progress=False)
    assert [row.label for row in rows] == ["frozen", "soft-moa", "lora"]
    for row in rows:
        assert {name: one.mode for name, one in row.tests.items()} == {"mix": "likelihood", "piqa": "text"}
    assert all(len(row.tests["mix"].losses) == 7 and not row.tests["piqa"].losses for row in rows)
    methods = {one.label: one for one in read_summary(config).methods}
    frozen = methods["frozen"].forgetting_mean
    assert frozen is not None
    assert (frozen.mean, frozen.by_questions) == (0, 0)
    before, after = (
        [int(one) for one in methods[label].rows[0].tests["piqa"].correct] for label in ("frozen", "lora")
    )
    change = methods["lora"].forgetting["piqa"]
    assert change.mean == pytest.approx(sum(after) / 8 - sum(before) / 8)
    pairs = [one - other for one, other in zip(after, before, strict=True)]
    assert change.by_questions == pytest.approx(statistics.stdev(pairs) / 8**0.5)


@pytest.mark.slow
def test_frozen_and_tuned_runs_are_of_the_revision_that_the_study_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = write_study(tmp_path)
    settings |= {"model": save_hub(tmp_path / "hub", monkeypatch), "seeds": [0], "learning_rates": [0.5]}
    settings |= {"methods": settings["methods"][1:], "tasks": "first"}
    settings["trainer"] |= {"model_init_kwargs": {"revision": "v1"}, "max_steps": 1}
    rows = run_study(open_study(StudyConfig.from_mapping(settings)), progress=False)
    assert [row.label for row in rows] == ["frozen", "lora"]
    v1 = identify(load(str(tmp_path / "hub/models--org--tiny/snapshots" / ("1" * 40))).model)
    assert {row.base_fingerprint for row in rows} == {v1.base_fingerprint}
    assert all(
        row.base_settings == {"revision": "v1", "dtype": "float32", "commit": "1" * 40} for row in rows
    )
    settings["methods"][0]["trainer"] = {"model_init_kwargs": {"revision": "v1"}}
    with pytest.raises(UsageError, match=r"lora: trainer\.model_init_kwargs must be that"):
        StudyConfig.from_mapping(settings)
