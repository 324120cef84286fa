import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from moa_peft.data.loading import load_rows
from moa_peft.data.row import Row, rows_md5
from moa_peft.errors import UsageError
from moa_peft.evaluation.tasks import load_task
from moa_peft.study.config import StudyConfig
from moa_peft.study.data import draw, load_data, row_set, source_of
from tiny_lm import number_rows, write_rows
from tiny_study import named, write_forgetting, write_study

Configs = Callable[..., StudyConfig]
PROGRAM = {
    "task_id": "HumanEval/0",
    "prompt": "def twice(x):\n",
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4",
}


@pytest.fixture
def config_of(tmp_path: Path) -> Configs:
    settings = write_study(tmp_path)
    return lambda **changes: StudyConfig.from_mapping({**settings, **changes})


def changed(row: Row, **changes: Any) -> Row:
    return dataclasses.replace(row, **changes)


def test_the_rows_of_a_study_are_named_counted_and_identified(config_of: Configs) -> None:
    data = load_data(config_of(train_limit=10))
    assert (data.train.rows, len(data.validation.questions)) == (10, 12)
    assert [(one.name, len(one.questions)) for one in data.tests] == [("first", 16), ("second", 16)]
    assert data.train.md5 != load_data(config_of()).train.md5
    assert data.train.file_md5 == load_data(config_of()).train.file_md5


def test_a_draw_is_the_same_everywhere_keeps_the_order_and_grows(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.json", named("test", 20))
    task = load_task(str(tmp_path))

    def places(limit: int | None, seed: int = 0) -> list[int]:
        return [task.questions.index(one) for one in draw(task, limit, seed).questions]

    # for p in $(seq 0 19); do echo $(printf "0:$p" | sha256sum) $p; done | sort | head -6
    assert places(6) == [4, 7, 9, 10, 15, 18]
    assert set(places(6)) < set(places(9))
    assert places(6) != places(6, seed=1)
    assert places(None) == places(20) == list(range(20))


def test_a_file_that_is_not_the_one_meant_is_refused(config_of: Configs) -> None:
    first = {one.name: one.file_md5 for one in load_data(config_of()).tests}["first"]
    load_data(config_of(data_md5={"first": first, "boolq": "of a task that is not in this study"}))
    with pytest.raises(
        UsageError, match=rf"data_md5: the rows of second \(.*\) have MD5 [0-9a-f]+, not {first}"
    ):
        load_data(config_of(data_md5={"second": first}))
    with pytest.raises(UsageError, match=r"the rows of train \(.*mix\) have MD5"):
        load_data(config_of(data_md5={"train": first}))
    with pytest.raises(UsageError, match="unknown task 'frist': did you mean 'first'"):
        load_data(config_of(data_md5={"frist": first}))


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        (
            "mix/train",
            named("SECOND", 20)[19],
            "1 rows of the test second are train rows too, such as 'second Q19",
        ),
        ("mix/validation", named("first?!", 3)[2], "1 rows of the test first are validation rows too"),
        (
            "mix/validation",
            named("train", 3)[2],
            "1 validation rows are training rows too, such as 'train Q2",
        ),
    ],
    ids=["trained on a test", "chosen on a test", "chosen on a trained one"],
)
def test_a_row_on_both_sides_is_refused_whatever_its_case_and_punctuation(
    file: str, row: Row, message: str, config_of: Configs, tmp_path: Path
) -> None:
    write_rows(tmp_path / f"{file}.json", [*named("more", 5), row])
    with pytest.raises(UsageError, match=message):
        load_data(config_of())


def test_one_file_for_training_and_validation_is_told_what_to_give(
    config_of: Configs, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "mine.json", named("mine", 40))
    with pytest.raises(UsageError, match="validation rows are the training rows: give --validation FILE"):
        load_data(dataclasses.replace(config_of(), data=str(rows), validation=None))


def test_sums_that_differ_in_their_sign_alone_are_two_questions(config_of: Configs, tmp_path: Path) -> None:
    sum_of, difference = (changed(named("x", 1)[0], instruction=f"What is 3 {sign} 2?") for sign in "+-")
    for name, row in (("mix/train", sum_of), ("first/test", difference)):
        write_rows(tmp_path / f"{name}.json", [dataclasses.replace(row, answer="", output="5")])
    assert load_data(config_of()).train.rows == 1


def test_a_test_of_the_validation_file_has_the_rows_that_chose_nothing(
    config_of: Configs, tmp_path: Path
) -> None:
    data = load_data(config_of(tasks="mix,first", validation_limit=5))
    assert [one.name for one in data.tests] == ["mix", "first"]
    chosen, tested = (
        {one.row.instruction for one in task.questions} for task in (data.validation, data.tests[0])
    )
    assert (len(chosen), len(tested), chosen & tested) == (5, 7, set())
    with pytest.raises(
        UsageError, match="the test mix is the file of the validation rows, and all of them are used"
    ):
        load_data(config_of(tasks="mix"))


def test_rows_of_several_sources_come_in_turn_and_each_is_tested_by_what_chose_nothing(
    config_of: Configs, tmp_path: Path
) -> None:
    write_rows(tmp_path / "other" / "train.json", named("other", 3))
    write_rows(tmp_path / "other" / "validation.json", named("other held out", 6))
    config = config_of(data="mix, other", tasks="mix,other,first", train_limit=8, validation_limit=9)
    source = source_of(config, "mix,other")
    rows = load_rows(source, limit=8)
    begins = [" ".join(row.instruction.split()[:1]) for row in rows]
    assert begins == ["train", "other", "train", "other", "train", "other", "train", "train"]
    data = load_data(config)
    assert (data.train.rows, data.train.md5) == (8, rows_md5(rows))
    chosen = {one.row.instruction for one in data.validation.questions}
    tested = [{one.row.instruction for one in task.questions} for task in data.tests[:2]]
    assert len(chosen) == 9
    assert [len(one) for one in tested] == [
        12 - sum(one.startswith("held") for one in chosen), 6 - sum(one.startswith("other") for one in chosen)
    ]  # fmt: skip
    assert not chosen & (tested[0] | tested[1])


def test_tasks_of_forgetting_are_drawn_and_must_hold_texts_under_a_name_of_their_own(
    config_of: Configs, tmp_path: Path
) -> None:
    write_forgetting(tmp_path)
    (task,) = load_data(config_of(forgetting="piqa", forgetting_limit=5)).forgetting
    assert (task.name, len(task.questions)) == ("piqa", 5)
    with pytest.raises(UsageError, match="tasks and forgetting have piqa twice"):
        load_data(config_of(forgetting="piqa", tasks="first,piqa"))
    with pytest.raises(UsageError, match="task 'second' has no choices whose texts can be compared"):
        load_data(config_of(forgetting="second", tasks="first"))


def test_a_validation_row_in_another_test_is_refused_where_rows_are_in_no_single_file(
    config_of: Configs, tmp_path: Path
) -> None:
    """Folders that `datasets` wrote have no checksum, which made every such test that of the validation rows."""
    rows = {"train": named("train", 8), "validation": named("held out", 6), "test": named("held out", 3)}
    for name, splits in (("both", ("train", "validation")), ("apart", ("test",))):
        parts = {one: Dataset.from_list([dataclasses.asdict(row) for row in rows[one]]) for one in splits}
        DatasetDict(parts).save_to_disk(str(tmp_path / name))
    with pytest.raises(UsageError, match="3 rows of the test apart are validation rows too"):
        load_data(config_of(data="both", tasks=str(tmp_path / "apart")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "text"}, "task 'validation' has no choices whose texts can be compared"),
        (
            {"tasks": "programs", "mode": "generation"},
            "the task programs runs the programs that a model writes, which no study does: leave it out, or give mode: likelih",
        ),
        (
            {"data": "sums", "choose_by": "accuracy", "mode": "likelihood"},
            "choose_by is accuracy, but the validation rows have no choices .* give choose_by: answer_loss, or mode: generation",
        ),
    ],
    ids=["no texts", "programs", "no accuracy"],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_trained(
    config_of: Configs, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Each was found out by a run that had been trained, or by none: then no learning rate was ever chosen."""
    for split in ("train", "validation"):
        rows = [changed(row, instruction=f"{split} {row.instruction}") for row in number_rows(4)]
        write_rows(tmp_path / "sums" / f"{split}.json", rows)
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "test.json").write_text(json.dumps([PROGRAM]))
    with pytest.raises(UsageError, match=message):
        load_data(config_of(**changes))


@pytest.mark.parametrize("name", ["first", "validation"])
def test_tests_of_one_name_are_refused(config_of: Configs, tmp_path: Path, name: str) -> None:
    """The rows of one took the place of the other's, or of the validation rows'."""
    write_rows(tmp_path / "other" / name / "test.json", named("other", 3))
    with pytest.raises(UsageError, match=f"tasks and forgetting have {name} twice"):
        load_data(config_of(tasks=["first", str(tmp_path / "other" / name)]))


def test_without_a_data_root_tasks_are_found_as_evaluation_finds_them(
    config_of: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = {"data": str(tmp_path / "mix"), "data_root": None, "forgetting": []}
    data = load_data(config_of(**own, tasks=[str(tmp_path / "first"), str(tmp_path / "second")]))
    assert [one.name for one in data.tests] == ["first", "second"]
    with pytest.raises(UsageError, match=r"task 'AddSub' is not on the hub in a form that is known here"):
        load_data(config_of(**own, tasks="AddSub"))


def test_rows_that_only_evaluation_reads_are_refused_before_anything_is_trained(
    config_of: Configs, tmp_path: Path
) -> None:
    (tmp_path / "mix" / "train.json").write_text('[{"question": "2 + 3?", "answer": "2 + 3 = 5\\n#### 5"}]')
    with pytest.raises(UsageError, match="has question, answer: a row needs instruction and output"):
        load_data(config_of())


def test_a_row_of_a_task_says_which_rows_were_used(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.json", named("test", 20))
    task = load_task(str(tmp_path))
    whole, part = row_set(task, "mine"), row_set(draw(task, 5, 0), "mine")
    assert (part.source, whole.rows, part.rows, whole.file_md5) == ("mine", 20, 5, part.file_md5)
    assert whole.md5 != part.md5
