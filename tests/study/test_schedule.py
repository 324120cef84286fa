import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from moa_peft.study.config import StudyConfig
from moa_peft.study.data import RowSet
from moa_peft.study.rows import RunRow, Scores, Stage
from moa_peft.study.schedule import (
    Job,
    Run,
    choose_rates,
    final_runs,
    needs_training,
    pending,
    recipe_of,
    run_hash,
    shared_settings,
    tried_rates,
    tuning_runs,
)

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


def losses_at(rates: Mapping[float, float | None], config: StudyConfig, label: str = "lora") -> list[RunRow]:
    """Rows of the tuning runs of one method at these rates, whatever the list of the study."""
    runs = tuning_runs(config, {one: list(rates) if one == label else [] for one in config.labels()})
    rows = []
    for run in runs:
        assert run.learning_rate is not None
        loss = rates[run.learning_rate]
        found = {"failure": "broke"} if loss is None else {"validation": scores(loss)}
        rows.append(row_of(run, config_hash=run_hash(shared(config), run), **found))
    return rows


GROWING = dataclasses.replace(CONFIG, most_rates=4)


@pytest.mark.parametrize(
    ("losses", "tried"),
    [
        ({1e-3: 2.0, 1e-2: 1.0}, [1e-3, 1e-2, 2e-2]),  # the next one is not done yet
        ({1e-3: 2.0, 1e-2: 1.0, 2e-2: 1.5}, [1e-3, 1e-2, 2e-2]),  # inside
        ({1e-3: 2.0, 1e-2: 1.0, 2e-2: 0.5, 4e-2: 0.4}, [1e-3, 1e-2, 2e-2, 4e-2]),  # the budget ends
        ({1e-3: 1.0, 1e-2: 2.0, 5e-4: 0.9}, [1e-3, 1e-2, 5e-4, 2.5e-4]),
        ({1e-3: 1.0, 1e-2: 2.0, 5e-4: 1.1}, [1e-3, 1e-2, 5e-4]),
        (
            {1e-3: 2.0, 1e-2: 1.0, 2e-2: None},
            [1e-3, 1e-2, 2e-2],
        ),  # a rate that fails is an end, and a bad one
        ({1e-3: None, 1e-2: None}, [1e-3, 1e-2]),
    ],
)
def test_a_method_gets_more_rates_while_its_choice_lies_at_an_end(
    losses: dict[float, float | None], tried: list[float]
) -> None:
    found = tried_rates(GROWING, shared(), losses_at(losses, GROWING))
    assert found == {"lora": tried, "soft-moa": [1e-3, 1e-2]}
    assert tried_rates(CONFIG, shared(), losses_at(losses, CONFIG))["lora"] == [1e-3, 1e-2]


@pytest.mark.parametrize(
    ("losses", "tried", "chosen"),
    [
        ({1e-3: 1.0, 1e-2: 0.9, 2e-2: 0.95}, [1e-3, 1e-2, 2e-2], 1e-2),  # inside
        ({1e-3: 1.0, 1e-2: 1.0}, [1e-3, 1e-2], 1e-3),
        ({1e-3: None, 1e-2: None}, [1e-3, 1e-2], 1e-3),
    ],
)
def test_of_equal_accuracies_the_loss_decides_and_where_it_does_not_no_rate_is_added(
    losses: dict[float, float | None], tried: list[float], chosen: float
) -> None:
    """The lowest of equal rates was the best, and so an end: the budget was spent on ever lower ones."""
    config = dataclasses.replace(GROWING, choose_by="accuracy")
    rows = [
        dataclasses.replace(
            row, validation=dataclasses.replace(scores(0), answer_loss=losses[row.learning_rate or 0])
        )
        for row in losses_at(dict.fromkeys(losses, 1.0), config)
    ]
    assert tried_rates(config, shared(config), rows)["lora"] == tried
    assert choose_rates(config, shared(config), rows)["lora"] == chosen
    better = [
        dataclasses.replace(row, validation=scores(9.0, accuracy=0.6)) if row.learning_rate == 1e-3 else row
        for row in rows
    ]
    assert tried_rates(config, shared(config), better)["lora"] == [1e-3, 1e-2, 5e-4]


def test_an_added_rate_is_chosen_like_the_others_and_awaited() -> None:
    grown = losses_at({1e-3: 2.0, 1e-2: 1.0, 2e-2: 0.5, 4e-2: 0.7}, GROWING)
    assert choose_rates(GROWING, shared(), grown)["lora"] == 2e-2
    waiting = losses_at({1e-3: 2.0, 1e-2: 1.0}, GROWING)
    assert choose_rates(GROWING, shared(), waiting)["lora"] is None


def test_rates_are_tried_on_fewer_rows_in_runs_of_their_own() -> None:
    config = dataclasses.replace(CONFIG, tuning_limit=5, train_limit=9)
    short, long = tuning_runs(config)[0], final_runs(config, {"soft-moa": 1e-3})[1]
    assert (short.name, long.name) == ("soft-moa-lr0.001-seed0-rows5", "soft-moa-lr0.001-seed0")
    assert run_hash(shared(config), short) != run_hash(shared(config), long)
    limits = [recipe_of(config, run, data="d", data_md5="m", folder="f").limit for run in (short, long)]
    assert limits == [5, 9]
    final = Job(run=long, stage="final")
    assert needs_training(config, final)
    assert not needs_training(dataclasses.replace(CONFIG, tuning_limit=9, train_limit=9), final)


def test_only_finalists_are_run_with_every_seed() -> None:
    only = dataclasses.replace(CONFIG, finalists=("lora",))
    runs = final_runs(only, {"soft-moa": 1e-2, "lora": 1e-3})
    assert [run.label for run in runs] == ["frozen", "lora", "lora"]
    assert len(tuning_runs(only)) == 8
    none = dataclasses.replace(CONFIG, finalists=())
    assert final_runs(none, {"soft-moa": 1e-2, "lora": 1e-3}) == [], "not the frozen model either"


def test_the_factors_of_a_method_are_in_its_recipe_and_its_hash() -> None:
    methods = [
        {"method": "lora", "lora_b_lr_factor": 4},
        {"method": "soft-moa", "router_lr_factor": 10},
        "molora",
    ]
    settings = {"out": "o", "data": "d", "methods": methods, "baseline": "lora"}
    config = StudyConfig.from_mapping(settings)
    recipes = [
        recipe_of(config, run, data="d", data_md5="m", folder="f")
        for run in final_runs(config, dict.fromkeys(config.labels(), 1e-3))[1:4]
    ]
    assert [one.lora_b_lr_factor for one in recipes] == [4, None, None]
    assert [one.router_lr_factor for one in recipes] == [None, 10, None]
    plain = StudyConfig.from_mapping({**settings, "methods": ["lora"]})
    hashes = {run_hash(shared(one), final_runs(one, {"lora": 1e-3})[1]) for one in (config, plain)}
    assert len(hashes) == 2


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
        ({"router_prompts": 1}, False),
        ({"router_prompts": 32}, True),
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
