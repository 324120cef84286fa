import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from moa_peft.errors import RunError, UsageError
from moa_peft.json_lines import append_rows, read_rows
from moa_peft.study import one_run as execute_module
from moa_peft.study.config import StudyConfig
from moa_peft.study.one_run import Order, describe, train_once
from moa_peft.study.report import read_summary
from moa_peft.study.rows import read_results
from moa_peft.study.runner import Study, open_study, planned, run_study
from moa_peft.study.statistics import summarise
from tiny_lm import tiny_llama, write_rows
from tiny_study import made_up_row, named, write_forgetting, write_study

Studies = Callable[..., Study]
ONE_RATE: dict[str, Any] = {"learning_rates": [0.01], "seeds": [0]}
SHORT: dict[str, Any] = {**ONE_RATE, "train_limit": 16, "validation_limit": 4, "test_limit": 4}
"""For what is really trained: two steps."""


@pytest.fixture
def study_of(tmp_path: Path) -> Studies:
    settings = write_study(tmp_path)
    return lambda **changes: open_study(StudyConfig.from_mapping({**settings, **changes}))


class Counted:
    """A pool that remembers what it was asked for."""

    def __init__(self, **found: Any) -> None:
        self.asked: list[str] = []
        self.found = found

    def __call__(self, orders: Sequence[Order]) -> Any:
        for order in orders:
            self.asked.append(f"{order.job.run.name} {order.job.stage} {'+'.join(order.job.tests)}")
            yield order, made_up_row(order, **self.found)


def test_a_finished_study_asks_for_nothing_and_more_seeds_methods_and_tasks_for_what_is_new(
    study_of: Studies, tmp_path: Path
) -> None:
    first = Counted()
    run_study(study_of(**ONE_RATE, tasks="first"), pool=first)
    assert first.asked == [
        "frozen final first",
        "soft-moa-lr0.01-seed0 final first",
        "lora-lr0.01-seed0 final first",
    ]
    again = Counted()
    run_study(study_of(**ONE_RATE, tasks="first"), pool=again)
    assert again.asked == []
    more = Counted()
    methods = [*json_methods(study_of()), {"method": "prompt-tuning"}]
    rows = run_study(study_of(**{**ONE_RATE, "seeds": [0, 5]}, methods=methods), pool=more)
    assert more.asked == [
        "frozen final second",
        "soft-moa-lr0.01-seed0 final second",
        "lora-lr0.01-seed0 final second",
        "prompt-tuning-lr0.01-seed0 final first+second",
        "soft-moa-lr0.01-seed5 final first+second",
        "lora-lr0.01-seed5 final first+second",
        "prompt-tuning-lr0.01-seed5 final first+second",
    ]
    assert all(set(row.tests) == {"first", "second"} for row in rows)
    study = json.loads((tmp_path / "out" / "study.json").read_text())
    assert list(study["methods"]) == ["soft-moa", "lora", "prompt-tuning"]


def json_methods(study: Study) -> list[dict[str, Any]]:
    return [dataclasses.asdict(one) for one in study.config.methods]


def test_rates_that_are_chosen_among_are_tried_first_and_their_runs_counted(study_of: Studies) -> None:
    study, pool = study_of(), Counted()
    assert planned(study, []) == {"train": 6, "score": 3}
    run_study(study, pool=pool)
    assert [one.split()[1] for one in pool.asked] == ["tuning"] * 4 + ["final"] * 5
    assert planned(study, read_results(study.folder)) == {"train": 0, "score": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 99}, "max_length was 400, is 99"),
        ({"router_prompts": 1}, "router_prompts was None, is 1"),
        ({"train_limit": 9}, "train_limit was None, is 9; train_md5 was"),
        ({"test_limit": 9}, "test_limit was 16, is 9; the rows of first: MD5 was"),
        ({"methods": ["soft-moa", "lora"]}, "soft-moa: mixture was {'router': {'kind': 'linear'}}, is {}"),
    ],
)
def test_a_folder_with_other_settings_is_refused_with_what_differs(
    changes: dict[str, Any], message: str, study_of: Studies
) -> None:
    run_study(study_of(**ONE_RATE), pool=Counted())
    with pytest.raises(UsageError) as caught:
        study_of(**ONE_RATE, **changes)
    assert message in str(caught.value)
    assert "methods, seeds, learning rates and tasks may be added" in str(caught.value)


def test_a_task_that_moves_from_forgetting_to_tasks_is_refused(study_of: Studies, tmp_path: Path) -> None:
    """Its accuracy by the texts of the choices stood among those of the tests."""
    write_forgetting(tmp_path)
    config = study_of(**ONE_RATE, tasks="first", forgetting="piqa").config
    run_study(open_study(config), pool=Counted())
    moved = dataclasses.replace(config, tasks="first,piqa", forgetting=())
    for use in (open_study, read_summary):
        with pytest.raises(
            UsageError, match="piqa moved between tasks and forgetting, which score it in two ways"
        ):
            use(moved)
    assert not open_study(dataclasses.replace(config, forgetting=())).jobs(
        "final", read_results(tmp_path / "out")
    )


@pytest.mark.slow
def test_a_base_model_may_lie_elsewhere(study_of: Studies, tmp_path: Path) -> None:
    """Its weights are compared, and not its path: rows were of no use on another machine."""
    study = study_of(**SHORT)
    *_, last = study.orders(study.jobs("final", []), progress=False)
    train_once(last)  # whose folder names the path
    run_study(study, pool=Counted())
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "base", tmp_path / "elsewhere" / "base")
    study = study_of(**SHORT, model=str(tmp_path / "elsewhere" / "base"))
    assert not study.jobs("final", read_results(study.folder))


@pytest.mark.slow
def test_a_run_whose_weights_are_gone_is_trained_again(study_of: Studies) -> None:
    """It failed with a message about a repository, --retry-failed or not."""
    study = study_of(**SHORT)
    *_, last = study.orders(study.jobs("final", []), progress=False)
    train_once(last)
    (last.folder / "adapter_model.safetensors").unlink()
    train_once(last)
    assert (last.folder / "adapter_model.safetensors").exists()


def test_a_test_whose_rows_changed_is_refused(study_of: Studies, tmp_path: Path) -> None:
    run_study(study_of(**ONE_RATE), pool=Counted())
    write_rows(tmp_path / "first" / "test.json", named("changed", 20))
    with pytest.raises(UsageError, match=r"the rows of first: MD5 was [0-9a-f]+, is [0-9a-f]+"):
        study_of(**ONE_RATE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tests": {"first": {"md5": "other"}}}, "the rows of first have MD5 other, not [0-9a-f]{32}"),
        ({"base_fingerprint": "other"}, "the weights of the base model are other, not one"),
        ({"base_fingerprint": "other", "base_settings": {"dtype": "bfloat16"}}, None),
        ({"base_fingerprint": None}, None),  # it failed before
    ],
)
def test_rows_of_two_machines_that_do_not_compare_are_refused(
    changes: dict[str, Any], message: str | None, study_of: Studies
) -> None:
    """Answers to other questions were paired by their places, and those of another base model with the study's own."""
    study = study_of(**ONE_RATE)
    base = {"base_settings": {"dtype": "float32"}, "base_fingerprint": "one"}
    run_study(study, pool=Counted(**base))
    file = study.folder / "results.jsonl"
    *rows, last = read_rows(file)
    tests = {name: {**one, **changes.get("tests", {}).get(name, {})} for name, one in last["tests"].items()}
    file.unlink()
    append_rows(file, [*rows, {**last, **changes, "tests": tests}])
    if message is None:
        assert read_summary(study.config).rows
        return
    for use in (open_study, read_summary):
        with pytest.raises(
            UsageError, match=rf"rows that do not compare \(lora, rate 0.01, seed 0: {message}\)"
        ):
            use(study.config)


def test_rows_without_their_study_and_a_damaged_study_are_refused(study_of: Studies, tmp_path: Path) -> None:
    run_study(study_of(**ONE_RATE), pool=Counted())
    file = tmp_path / "out" / "study.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(UsageError, match=r"study.json is damaged: get the file of this study again"):
        study_of(**ONE_RATE)
    file.unlink()
    with pytest.raises(
        UsageError, match=r"holds results.jsonl without study.json: put the study.json of these rows"
    ):
        study_of(**ONE_RATE)


def test_a_row_of_something_else_is_refused(study_of: Studies, tmp_path: Path) -> None:
    append_rows(tmp_path / "out" / "results.jsonl", [{"kind": "train"}])
    with pytest.raises(UsageError, match="line 1 is no row of a study that this version writes"):
        study_of()


def test_weights_that_other_settings_trained_are_refused_where_rows_and_study_are_gone(
    study_of: Studies, tmp_path: Path
) -> None:
    """The folder of a trained run was taken as it was, and its weights stood in a row of the new settings.

    Seen with results.jsonl and study.json deleted; missed because only study.json was compared.
    """
    study = study_of(**SHORT)
    *_, last = study.orders(study.jobs("final", []), progress=False)
    train_once(last)
    assert study_of(**SHORT, data_root=str(tmp_path / ".")).shared == study.shared
    for changes, differing in (
        ({"max_length": 300}, "max_length"),
        ({"train_limit": 9}, "data, limit"),
        ({"trainer": {**study.config.trainer, "weight_decay": 0.5, "save_steps": 2}}, "weight_decay"),
    ):
        with pytest.raises(
            UsageError,
            match=rf"runs/lora-lr0.01-seed0 was begun with other values of {differing}: go on with those, delete",
        ):
            study_of(**{**SHORT, **changes})
    (last.folder / "moa_recipe.json").unlink()
    with pytest.raises(UsageError, match=r"holds training.json without moa_recipe.json: delete that folder"):
        study_of(**SHORT)


def test_what_another_call_did_since_the_study_was_opened_is_looked_at(study_of: Studies) -> None:
    """Two calls with different settings on a new folder both ran: the second was checked before the first wrote."""
    late = study_of(**ONE_RATE, max_length=300)
    run_study(study_of(**ONE_RATE), pool=Counted())
    with pytest.raises(UsageError, match="max_length was 400, is 300"):
        run_study(late, pool=Counted())


@pytest.mark.slow
def test_a_base_model_with_other_weights_is_refused_in_one_line_before_anything_is_trained(
    study_of: Studies, tmp_path: Path
) -> None:
    """A base folder overwritten between two calls gave rows with one test of each base."""
    lora = json_methods(study_of())[1:]
    run_study(study_of(**SHORT, tasks="first", methods=lora), progress=False)
    before = read_rows(tmp_path / "out" / "results.jsonl")
    tiny_llama(seed=5).save_pretrained(tmp_path / "base")
    for changes in ({"methods": lora}, {"tasks": "first"}):  # a score only, and a method to train
        study = study_of(**SHORT, **changes)
        with pytest.raises(
            UsageError,
            match=rf"base model {tmp_path}/base are [0-9a-f]+, in the rows of .* {before[0]['base_fingerprint']}: give",
        ):
            run_study(study, progress=False)
    assert read_rows(tmp_path / "out" / "results.jsonl") == before
    assert not (tmp_path / "out" / "runs" / "soft-moa-lr0.01-seed0").exists()


@pytest.mark.parametrize(("weights", "asked_anew"), [("one", []), ("other", ["first"] * 3)])
def test_tests_of_other_weights_of_the_same_run_are_not_joined_but_done_again(
    weights: str, asked_anew: list[str], study_of: Studies
) -> None:
    """A run that was trained anew for a new test got a row with the tests of two adapters."""
    run_study(study_of(**ONE_RATE, tasks="first"), pool=Counted(adapter_fingerprint="one"))
    pool = Counted(adapter_fingerprint=weights)
    rows = run_study(study_of(**ONE_RATE), pool=pool)
    assert [one.split()[-1] for one in pool.asked] == ["second"] * 3 + asked_anew
    assert all(set(row.tests) == {"first", "second"} for row in rows)
    assert {row.adapter_fingerprint for row in rows} == {weights}


def test_a_second_process_in_the_same_folder_is_refused(study_of: Studies, tmp_path: Path) -> None:
    study = study_of()
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(UsageError, match="another process works in"),
    ):
        run_study(study)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["soft-mao", "lora"]}, "unknown method 'soft-mao': did you mean 'soft-moa'"),
        ({"methods": [{"method": "lora", "mixture": {"experts": {7: {}}}}]}, "experts.7 does not exist"),
        ({"trainer": {"num_train_epochs": "two"}}, "num_train_epochs is 'two': give a number"),
        (
            {"trainer": {"per_device_train_batch_size": None}},
            "per_device_train_batch_size is None: give a whole number",
        ),
        ({"trainer": {"save_strategy": "sometimes"}}, "the trainer refuses these settings"),
        ({"model": "./no/model"}, "model './no/model' does not exist: give a folder with a config.json"),
        (
            {
                "methods": [
                    "lora",
                    {"method": "lora", "label": "high", "mixture": {"layers_to_transform": [99]}},
                ]
            },
            r"high does not fit the model '.*/base': layers \[99\] do not exist: the model has blocks 0 to 1",
        ),
        (
            {"methods": [{"method": "lora", "mixture": {"experts": {0: {"targets": ["c_attn"]}}}}]},
            "lora does not fit the model '.*/base': expert 'lora': unknown target of llama 'c_attn'",
        ),
    ],
)
def test_what_no_run_could_do_is_refused_before_anything_is_read(
    changes: dict[str, Any], message: str, study_of: Studies
) -> None:
    with pytest.raises(UsageError, match=message):
        study_of(data="nowhere", **changes)


@pytest.mark.slow
def test_a_run_that_fails_has_a_row_that_says_so_the_study_goes_on_and_it_can_be_done_again(
    study_of: Studies, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, broken = execute_module.train, []

    def breaks(preparation: Any) -> Any:
        if preparation.recipe.method == "soft-moa" and not broken:
            broken.append(True)
            raise RunError("the loss of step 1 is nan")
        return train(preparation)

    monkeypatch.setattr(execute_module, "train", breaks)
    said: list[str] = []
    study = study_of(**SHORT, tasks="first")
    rows = {row.label: row for row in run_study(study, say=said.append, progress=False)}
    assert rows["soft-moa"].failure == "RunError: the loss of step 1 is nan"
    assert (rows["soft-moa"].validation, rows["soft-moa"].steps, rows["soft-moa"].tests) == (None, None, {})
    assert rows["lora"].failure is None
    assert rows["lora"].tests["first"].n == 4
    assert "    soft-moa-lr0.01-seed0 failed: RunError: the loss of step 1 is nan; 2 of 3 done" in " ".join(
        said
    )
    assert len(read_rows(study.folder / "results.jsonl")) == 3
    run_study(study, progress=False)
    assert len(read_rows(study.folder / "results.jsonl")) == 3, "a failure is not done again unasked"
    again = {row.label: row for row in run_study(study, progress=False, retry_failed=True)}
    assert again["soft-moa"].failure is None
    assert again["soft-moa"].tests["first"].n == 4
    assert len(read_rows(study.folder / "results.jsonl")) == 4


def test_a_run_that_fails_at_an_added_test_keeps_its_scores_and_its_failure_until_it_is_done_again(
    study_of: Studies,
) -> None:
    """The earlier row took the failed one's place: no failure was reported, and every call did the runs again."""

    def broken(orders: Sequence[Order]) -> Any:
        for order in orders:
            yield order, describe(order, {}, "UsageError: a question is too long")

    run_study(study_of(**ONE_RATE, tasks="first"), pool=Counted())
    study = study_of(**ONE_RATE)
    run_study(study, pool=broken)
    again = Counted()
    rows = run_study(study, pool=again)
    assert again.asked == []
    assert planned(study, rows) == {"train": 0, "score": 0}
    assert {(row.failure, *row.tests) for row in rows} == {("UsageError: a question is too long", "first")}
    summary = summarise(study.config, study.shared, list(study.tests), rows)
    assert [row.label for row in summary.failures] == ["frozen", "soft-moa", "lora"]
    assert summary.missing == ()
    assert [list(one.tests) for one in summary.methods] == [["first"]] * 3
    first = study_of(**ONE_RATE, tasks="first")
    assert summarise(first.config, first.shared, list(first.tests), rows).failures == ()
    run_study(study, pool=broken, retry_failed=True)
    rows = run_study(study, pool=again, retry_failed=True)
    assert [one.split()[-1] for one in again.asked] == ["second"] * 3
    assert {(row.failure, *row.tests) for row in rows} == {(None, "first", "second")}


def test_a_full_disk_ends_the_study_instead_of_failing_run_after_run(
    study_of: Studies, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(execute_module, "train_once", full)
    study = study_of(**SHORT)
    with pytest.raises(OSError, match="No space left"):
        run_study(study, progress=False)
    assert [row["label"] for row in read_rows(study.folder / "results.jsonl")] == ["frozen"]
