import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from moa_peft.compare.config import StudyConfig
from moa_peft.compare.data import RowSet
from moa_peft.compare.plan import (
    Run,
    choose_rates,
    final_runs,
    pending,
    run_hash,
    shared_settings,
    tuning_runs,
)
from moa_peft.compare.rows import RunRow, Scores, Stage

CONFIG = StudyConfig.from_mapping(
    {
        "out": "o",
        "data": "d",
        "methods": ["soft-moa", {"method": "lora", "mixture": {"experts": {0: {"rank": 4}}}}],
        "baseline": "lora",
        "seeds": [0, 1],
        "learning_rates": [1e-3, 1e-2],
        "tuning_seeds": [0, 7],
    }
)


def shared(config: StudyConfig = CONFIG, **changes: Any) -> dict[str, Any]:
    return shared_settings(dataclasses.replace(config, **changes), "train", "validation")


def scores(loss: float, accuracy: float = 0.5) -> Scores:
    return Scores(
        n=2, md5="m", file_md5=None, mode="likelihood", extraction="sum", accuracy=accuracy,
        standard_error=0.3, answer_loss=loss, answer_loss_standard_error=0.1, correct="10",
    )  # fmt: skip


def row_of(
    run: Run, stage: Stage = "tuning", tests: Mapping[str, Scores] | None = None, **changes: Any
) -> RunRow:
    names = {one.name for one in dataclasses.fields(RunRow)}
    values: dict[str, Any] = dict.fromkeys(names - {"kind"})
    values |= {"stage": stage, "label": run.label, "learning_rate": run.learning_rate, "seed": run.seed}
    values |= {"config_hash": run_hash(shared(), run), "tests": tests or {}, "validation": scores(1.0)}
    values |= {"train": RowSet(source="d", rows=3, md5="t", file_md5=None)}
    return RunRow(**{**values, **changes})


def tuned(losses: Mapping[tuple[str, float, int], float | None]) -> list[RunRow]:
    rows = []
    for run in tuning_runs(CONFIG):
        assert run.learning_rate is not None
        assert run.seed is not None
        key = (run.label, run.learning_rate, run.seed)
        if key in losses:
            loss = losses[key]
            found = {"failure": "broke"} if loss is None else {"validation": scores(loss, accuracy=loss / 10)}
            rows.append(row_of(run, **found))
    return rows


LOSSES = {
    ("soft-moa", 1e-3, 0): 1.0,
    ("soft-moa", 1e-3, 7): 3.0,
    ("soft-moa", 1e-2, 0): 2.5,
    ("soft-moa", 1e-2, 7): 1.0,
    ("lora", 1e-3, 0): 1.0,
    ("lora", 1e-3, 7): 1.0,
    ("lora", 1e-2, 0): 2.0,
    ("lora", 1e-2, 7): 2.0,
}


def test_every_method_is_tried_with_every_rate_on_every_tuning_seed_and_no_other() -> None:
    tried = [(run.label, run.learning_rate, run.seed) for run in tuning_runs(CONFIG)]
    assert sorted(tried) == sorted(LOSSES)
    assert tuning_runs(dataclasses.replace(CONFIG, learning_rates=(1e-3,))) == []


def test_the_rate_with_the_lowest_mean_loss_over_the_tuning_seeds_is_chosen() -> None:
    assert choose_rates(CONFIG, shared(), tuned(LOSSES)) == {"soft-moa": 1e-2, "lora": 1e-3}


def test_the_highest_accuracy_chooses_where_that_is_asked() -> None:
    by_accuracy = dataclasses.replace(CONFIG, choose_by="accuracy")
    assert choose_rates(by_accuracy, shared(), tuned(LOSSES)) == {"soft-moa": 1e-3, "lora": 1e-2}


def test_nothing_is_chosen_before_all_are_tried() -> None:
    without = {key: loss for key, loss in LOSSES.items() if key != ("lora", 1e-2, 7)}
    assert choose_rates(CONFIG, shared(), tuned(without)) == {"soft-moa": 1e-2, "lora": None}


def test_a_rate_that_failed_is_out_and_a_method_whose_rates_all_failed_has_none() -> None:
    failed: dict[tuple[str, float, int], float | None] = {**LOSSES, ("soft-moa", 1e-2, 7): None}
    failed |= {("lora", 1e-3, 0): None, ("lora", 1e-2, 0): None}
    assert choose_rates(CONFIG, shared(), tuned(failed)) == {"soft-moa": 1e-3, "lora": None}


def test_the_smallest_of_equal_rates_is_chosen() -> None:
    assert choose_rates(CONFIG, shared(), tuned(dict.fromkeys(LOSSES, 1.0))) == {
        "soft-moa": 1e-3,
        "lora": 1e-3,
    }


def test_a_rate_is_not_chosen_by_what_a_test_says() -> None:
    """Rows of finished runs, whatever their scores, have no part in the choice."""
    finals = [row_of(run, "final", validation=scores(0.0)) for run in tuning_runs(CONFIG)]
    assert choose_rates(CONFIG, shared(), finals) == {"soft-moa": None, "lora": None}


def test_final_runs_go_seed_by_seed_and_begin_with_the_frozen_model() -> None:
    runs = final_runs(CONFIG, {"soft-moa": 1e-2, "lora": 1e-3})
    assert [run.name for run in runs] == [
        "frozen",
        "soft-moa-lr0.01-seed0",
        "lora-lr0.001-seed0",
        "soft-moa-lr0.01-seed1",
        "lora-lr0.001-seed1",
    ]


def test_no_two_rates_share_a_folder_and_short_ones_have_short_names() -> None:
    """0.003162278 and 0.00316227766 are one number in six digits: the second took the first one's weights."""
    rates = [1e-3, 7.5e-4, 5e-5, 1, 0.003162278, 0.00316227766, 0.1 + 0.2, 0.3]
    names = [run.name for run in tuning_runs(dataclasses.replace(CONFIG, learning_rates=rates))[: len(rates)]]
    assert names == [
        f"soft-moa-lr{rate}-seed0"
        for rate in ("0.001", "0.00075", "5e-05", "1", "0.003162278", "0.00316227766", "0.30000000000000004", "0.3")
    ]  # fmt: skip


def test_what_is_done_is_not_left_and_a_new_test_is_all_that_is_left_of_a_run() -> None:
    runs = final_runs(CONFIG, {"soft-moa": 1e-2, "lora": 1e-3})
    rows = [row_of(run, "final", {"first": scores(1.0)}) for run in runs[:2]]
    rows.append(row_of(runs[2], "final", failure="broke"))
    left = pending(runs, "final", rows, shared=shared(), tests=["first"])
    assert [job.run for job in left] == runs[3:]
    again = pending(runs, "final", rows, shared=shared(), tests=["first"], retry_failed=True)
    assert [job.run for job in again] == runs[2:]
    more = pending(runs, "final", rows, shared=shared(), tests=["first", "second"])
    assert [(job.run.name, job.tests) for job in more][:3] == [
        ("frozen", ("second",)),
        ("soft-moa-lr0.01-seed0", ("second",)),
        ("soft-moa-lr0.01-seed1", ("first", "second")),
    ]


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"train_limit": 5}, False),
        ({"model": "other"}, False),
        ({"trainer": {"num_train_epochs": 9}}, False),
        ({"draw_seed": 1}, False),
        ({"seeds": (5,)}, True),
        ({"learning_rates": (1.0,)}, True),
        ({"out": "elsewhere", "data_root": "elsewhere"}, True),
        ({"trainer": {"save_steps": 9, "disable_tqdm": True}}, True),
        ({"batch_size": 3}, True),
    ],
)
def test_the_hash_of_a_run_changes_with_what_decides_it_alone(changes: dict[str, Any], same: bool) -> None:
    run = final_runs(CONFIG, {"soft-moa": 1e-2})[1]
    assert (run_hash(shared(), run) == run_hash(shared(**changes), run)) is same


def test_the_hash_of_a_run_is_that_of_its_method_rate_and_seed_and_not_of_its_label() -> None:
    run = final_runs(CONFIG, {"lora": 1e-2})[1]
    assert run.method is not None
    others = [
        dataclasses.replace(run, seed=9),
        dataclasses.replace(run, learning_rate=1e-4),
        dataclasses.replace(run, method=dataclasses.replace(run.method, mixture={})),
        dataclasses.replace(run, method=None),
    ]
    assert len({run_hash(shared(), one) for one in (run, *others)}) == 5
    assert run_hash(shared(), run) == run_hash(shared(), dataclasses.replace(run, label="renamed"))
