import gzip
import hashlib
from pathlib import Path

import pytest

from moa_peft.data.row import Row
from moa_peft.errors import UsageError
from moa_peft.evaluation.extraction_rules import stated
from moa_peft.evaluation.questions import as_question
from moa_peft.evaluation.tasks import GROUPS, load_task, load_tasks, task_names
from tiny_lm import choice_rows, number_rows, write_rows

DATA = Path(__file__).parents[2] / "../shared/data"


def row(instruction: str, answer: str, output: str = "") -> Row:
    return Row(instruction=instruction, input="", output=output, answer=answer)


def test_choices_come_from_the_rows_own_answer_format_and_replies_from_its_output() -> None:
    asked = as_question(
        row("Q?\n\nOption1: x Option2: y Answer format: option1/option2", "option2", "It is option2")
    )
    assert asked.form.kind == "choice"
    assert asked.form.choices == ("option1", "option2")
    assert asked.completions == ("It is option1", "It is option2")
    assert asked.wanted == 1
    bare = as_question(row("Q?\n\nAnswer format: true/false", "true"))
    assert bare.completions == ("the correct answer is true", "the correct answer is false")


@pytest.mark.parametrize(
    ("stated", "choices"),
    [
        ("Paris/New York", ("Paris", "New York")),
        ("New York/Paris", ("New York", "Paris")),
        ("Paris / Rome.", ("Paris", "Rome")),
        ("Paris/Rome\n\nThink.", ("Paris", "Rome")),
        ("Paris/Rome Please choose one.", ("Paris", "Rome")),
        ("Paris/Rome (one word)", ("Paris", "Rome")),
        ("Paris/Rome Question: is 1/2 of it in Italy?", ("Paris", "Rome")),
    ],
)
def test_choices_may_be_of_several_words(stated: str, choices: tuple[str, ...]) -> None:
    assert as_question(row(f"Where?\n\nAnswer format: {stated}", "Paris")).form.choices == choices


@pytest.mark.parametrize("answer", ["yes", "no"])
def test_the_choices_do_not_depend_on_the_answer_and_end_with_their_sentence(answer: str) -> None:
    asked = as_question(row("Q?\n\nAnswer format: yes/no. Think first.", answer))
    assert asked.form.choices == ("yes", "no")


def test_an_answer_that_is_none_of_the_choices_in_words_is_an_error() -> None:
    with pytest.raises(
        UsageError, match="the answer is 'Positive', its answer format allows positive, negative"
    ):
        as_question(row("Q?\n\nAnswer format: positive / negative", "Positive"))


@pytest.mark.parametrize(
    "stated", ["a number in km/h", "a short text and/or a number", "the date, yyyy/mm/dd"]
)
def test_a_format_in_words_names_no_choices(stated: str) -> None:
    assert as_question(row(f"How fast?\n\nAnswer format: {stated}", "42")).form.kind == "number"


def test_a_rationale_is_no_part_of_the_replies_that_are_compared() -> None:
    output = "Heat rises, so only answer2 fits: the correct answer is answer2"
    asked = as_question(row("Why?\n\nAnswer format: answer1/answer2", "answer2", output))
    assert asked.completions == ("the correct answer is answer1", "the correct answer is answer2")


@pytest.mark.parametrize(
    ("output", "replies"),
    [
        ("Colour: red.", ("Colour: red.", "Colour: blue.")),
        ("Colour: **red**\n", ("Colour: **red**\n", "Colour: **blue**\n")),
        ("Colour: red, I think", ("the correct answer is red", "the correct answer is blue")),
        ("Blue is wrong. Colour: red", ("the correct answer is red", "the correct answer is blue")),
        ("No colour that I know", ("the correct answer is red", "the correct answer is blue")),
    ],
)
def test_replies_are_as_trained_unless_they_give_the_answer_away(
    output: str, replies: tuple[str, ...]
) -> None:
    assert as_question(row("Which?\n\nAnswer format: red/blue", "red", output)).completions == replies


@pytest.mark.parametrize(
    ("reply", "place"),
    [
        ("It is a hard one.", None),
        ("I have no idea, a mystery.", None),
        ("A train is not C.", None),
        ("A mystery to me; b", 1),
        ("The answer is B.", 1),
        ("the answer is c", 2),
        ("B is correct.", 1),
        ("A is correct.", 0),
        ("Option B", 1),
        ("B, because it fits.", 1),
        ("B", 1),
        ("A", 0),
    ],
)
def test_of_choices_of_one_letter_an_article_is_none(reply: str, place: int | None) -> None:
    for choices in ("ABC", "abc"):
        said = reply if choices == "ABC" else reply.replace("B", "b").replace("C", "c")
        said = said.replace("A is", "a is") if choices == "abc" else said.replace("; b", "; B")
        asked = as_question(row(f"Which?\n\nAnswer format: {'/'.join(choices)}", choices[0]))
        assert stated(said, asked.form) == (None if place is None else choices[place]), said
    assert stated("a", as_question(row("Which?\n\nAnswer format: A/B", "A")).form) == "A"


def test_an_article_before_the_answer_gives_no_letter_away() -> None:
    asked = as_question(row("Which?\n\nAnswer format: A/B", "B", "Here is a short answer: B"))
    assert asked.completions == ("Here is a short answer: A", "Here is a short answer: B")


def test_letters_numbers_text_and_no_answer_are_told_apart() -> None:
    listed = "Which? Answer Choices: (A) 1 (B) 2 (C) 3"
    assert as_question(row(listed, "B")).form.kind == "letter"
    assert as_question(row(listed, "B")).form.choices == ("A", "B", "C")
    assert as_question(row("1 + 1?", "2.0")).form.kind == "number"
    assert as_question(row("Capital?", "Paris")).form.kind == "text"
    assert as_question(row("Write a poem.", "")).form.kind == "none"
    assert as_question(row("1 + 1?", "2.0")).wanted is None


def test_an_answer_outside_its_format_is_named_with_its_row(tmp_path: Path) -> None:
    rows = [*choice_rows(1), row("Q?\n\nAnswer format: yes/no", "maybe")]
    file = write_rows(tmp_path / "mine.json", rows)
    with pytest.raises(
        UsageError, match=r"mine.json, row 2: the answer is 'maybe', its answer format allows yes, no"
    ):
        load_task(str(file))


def test_a_task_takes_its_held_out_split_and_names_itself(tmp_path: Path) -> None:
    write_rows(tmp_path / "own/train.json", number_rows(3))
    write_rows(tmp_path / "own/validation.json", number_rows(2))
    assert load_task(str(tmp_path / "own")).split == "validation"
    test = write_rows(tmp_path / "own/test.json", number_rows(4))
    task = load_task(str(tmp_path / "own"), limit=3)
    assert (task.name, task.split, len(task.questions), task.limit) == ("own", "test", 3, 3)
    assert task.file_md5 == hashlib.md5(test.read_bytes()).hexdigest()
    assert load_task(str(test)).name == "own"
    assert load_task(str(tmp_path / "own"), split="train").split == "train"
    zipped = tmp_path / "other.json.gz"
    zipped.write_bytes(gzip.compress(test.read_bytes()))
    again = load_task(str(zipped))
    assert (again.name, again.file_md5) == ("other", task.file_md5)


def test_names_groups_files_and_folders_are_found(tmp_path: Path) -> None:
    for name in (*GROUPS["math"], "piqa", "ARC-Easy", "extra"):
        write_rows(tmp_path / name / "test.json", number_rows(1))
    file = write_rows(tmp_path / "rows.json", number_rows(1))
    found = load_tasks(f"math, PIQA,arc-e,gsm8k,extra,{file}", data_root=tmp_path)
    assert [one.name for one in found] == [*GROUPS["math"], "piqa", "ARC-Easy", "extra", "rows"]


@pytest.mark.parametrize("is_there", [True, False])
def test_tasks_are_named_without_their_rows_as_with_them(is_there: bool, tmp_path: Path) -> None:
    for name in ("piqa", "own", "extra"):
        write_rows(tmp_path / name / "test.json", number_rows(1))
    file = write_rows(tmp_path / "rows.json", number_rows(1))
    given = f"extra,obqa,{tmp_path}/own,{file},PIQA,piqa,{tmp_path}/piqa/test.json,name/on-the-hub"
    wanted = ["extra", "openbookqa", "own", "rows", "piqa", "name/on-the-hub"]
    if is_there:
        read = load_tasks(f"extra,{tmp_path}/own,{file},PIQA,{tmp_path}/piqa/test.json", data_root=tmp_path)
        assert {one.name for one in read} < set(wanted)
    else:
        given = given.replace(str(tmp_path), "nowhere")
    assert task_names(given, ["own"]) == wanted
    assert task_names("math", []) == list(GROUPS["math"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("pica", "unknown task 'pica': did you mean 'piqa'"),
        (" , ", "--tasks is empty"),
        ("missing.json", "task file missing.json does not exist"),
        ("boolq", "task 'boolq' is not under the data root .* it holds piqa"),
    ],
)
def test_a_wrong_name_is_told_before_anything_is_read(names: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    with pytest.raises(UsageError, match=message):
        load_tasks(names, data_root=tmp_path)


def test_a_split_of_one_file_is_refused_unless_it_is_its_name(tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "validation.json", choice_rows(2)))
    assert load_tasks(file, split="validation")[0].split == "validation"
    with pytest.raises(UsageError, match=r"split 'test' was asked for, and .*validation\.json is one file"):
        load_tasks(file, split="test")


def test_a_path_is_a_path_even_where_its_letters_name_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "piqa", tmp_path / "root/piqa"):
        folder.mkdir(parents=True)
        write_rows(folder / "test.json", choice_rows(3))
    for given in ("./piqa", "piqa/"):
        assert load_tasks(given, data_root=tmp_path / "root")[0].source == given
    (tmp_path / "piqa").rename(tmp_path / "moved")
    assert load_tasks("piqa/", data_root=tmp_path / "root")[0].name == "piqa"
    assert load_tasks("piqa", data_root=tmp_path / "root")[0].source == str(tmp_path / "root/piqa")


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("instruction,output")
    with pytest.raises(UsageError, match=r"rows\.csv is of an unknown kind: its name must end in \.json"):
        load_tasks(str(tmp_path / "rows.csv"))
    with pytest.raises(UsageError, match=r"~nobody-of-this-name/x\.json does not exist"):
        load_tasks("~nobody-of-this-name/x.json")


def test_a_missing_data_root_and_an_empty_task_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the data root .*none is no folder: give --data-root"):
        load_tasks("math", data_root=tmp_path / "none")
    empty = write_rows(tmp_path / "empty.json", [])
    with pytest.raises(UsageError, match="holds no rows"):
        load_tasks(str(empty))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UsageError, match="it holds no folder"):
        load_tasks("math", data_root=tmp_path / "bare")


def test_every_real_test_file_is_read_with_the_form_of_its_answers() -> None:
    if not DATA.is_dir():
        pytest.skip("the data folder is not beside the checkout")
    for task in load_tasks("commonsense", data_root=DATA, limit=50):
        assert task.has_choices, task.name
        for one in task.questions:
            assert one.row.output in one.completions
    kinds = {
        task.name: {one.form.kind for one in task.questions} for task in load_tasks("math", data_root=DATA)
    }
    assert kinds.pop("AQuA") == {"letter"}
    assert set().union(*kinds.values()) == {"number"}
