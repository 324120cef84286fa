"""Rows from files, folders and `datasets`, and every way in which they can be wrong."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from moa_peft.data.loading import load_rows
from moa_peft.data.row import Row
from moa_peft.errors import UsageError

RECORDS = [
    {"instruction": f"What is {n} + 1?", "input": "", "output": f"It is {n + 1}.", "answer": str(n + 1)}
    for n in range(5)
]
ROWS = [Row(**record) for record in RECORDS]


def write(file: Path, text: str) -> str:
    data = text.encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return str(file)


def as_lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.gz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    text = as_lines(RECORDS) if ".jsonl" in name else json.dumps(RECORDS)
    source = write(tmp_path / name, text)
    assert load_rows(source) == ROWS
    assert load_rows(source, limit=2) == ROWS[:2]


def test_a_byte_order_mark_and_blank_lines_change_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", "\ufeff" + as_lines(RECORDS[:1]) + "\n  \n" + as_lines(RECORDS[1:]))
    assert load_rows(source) == ROWS


def test_a_folder_gives_the_split_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "train.json.gz", json.dumps(RECORDS[:3]))
    write(tmp_path / "test.jsonl", as_lines(RECORDS[3:]))
    write(tmp_path / "manifest.txt", "not rows")
    assert load_rows(str(tmp_path)) == ROWS[:3]
    assert load_rows(str(tmp_path), split="test") == ROWS[3:]


def test_files_that_are_no_splits_are_left_alone(tmp_path: Path) -> None:
    """What macOS leaves beside a file, and the description of an older data set of the hub."""
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000-of-00001.jsonl", as_lines(RECORDS))
    write(tmp_path / "dataset_infos.json", "{}")
    write(tmp_path / "._train.jsonl", "\0")
    assert load_rows(str(tmp_path)) == ROWS


def test_the_demo_data_is_one_of_several_sources(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.jsonl", as_lines(RECORDS))
    rows = load_rows(f"demo, {file}", limit=4)
    assert rows[::2] == load_rows("demo", limit=2)
    assert rows[1::2] == ROWS[:2]


def test_an_empty_source_among_several_is_an_error(tmp_path: Path) -> None:
    """It was left out, and the mixture of rows lacked one of its parts."""
    full, empty = write(tmp_path / "full.jsonl", as_lines(RECORDS)), write(tmp_path / "empty.jsonl", "\n")
    with pytest.raises(UsageError, match=r"data '.*empty\.jsonl' holds no rows"):
        load_rows(f"{full},{empty}", limit=1)


def test_a_folder_with_one_split_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("train.json", "train.jsonl", "test.json"):
        write(tmp_path / name, as_lines(RECORDS[:1]) if name.endswith("l") else json.dumps(RECORDS[:1]))
    with pytest.raises(
        UsageError, match=r"holds train\.json and train\.jsonl, both the split 'train': keep one"
    ):
        load_rows(str(tmp_path))
    assert len(load_rows(str(tmp_path), split="test")) == 1


def test_a_folder_names_its_splits_when_asked_for_another(tmp_path: Path) -> None:
    write(tmp_path / "train.json.gz", json.dumps(RECORDS))
    write(tmp_path / "test.jsonl", as_lines(RECORDS))
    with pytest.raises(
        UsageError, match=r"unknown split 'tests': did you mean 'test'\? known: test, train \(in the folder"
    ):
        load_rows(str(tmp_path), split="tests")


@pytest.mark.parametrize(
    ("record", "row"),
    [
        ({"instruction": "a", "output": "b"}, Row(instruction="a", input="", output="b", answer="")),
        (
            {"instruction": "a", "input": None, "output": "b", "answer": 72.0, "id": 3},
            Row(instruction="a", input="", output="b", answer="72.0"),
        ),
        ({"prompt": "a ", "completion": " b"}, Row(instruction="a ", input="", output=" b", answer="")),
        (
            {"prompt": "a", "completion": "b", "answer": "c"},
            Row(instruction="a", input="", output="b", answer="c"),
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            Row(instruction="a", input="", output="b", answer=""),
        ),
        (
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": "b"}],
            },
            Row(instruction="a", input="", output="b", answer="", system="s"),
        ),
        (
            {"instruction": "a", "output": "b", "system": "s", "history": "Rome", "tools": " [] "},
            Row(instruction="a", input="", output="b", answer="", system="s"),
        ),
        (
            {
                "messages": [
                    {"role": one, "content": text}
                    for one, text in (("system", " "), ("user", "a"), ("assistant", "b"))
                ],
                "system": "s",
            },
            Row(instruction="a", input="", output="b", answer="", system="s"),
        ),
    ],
)
def test_every_form_of_record_becomes_the_row_it_means(
    tmp_path: Path, record: dict[str, Any], row: Row
) -> None:
    assert load_rows(write(tmp_path / "a.jsonl", as_lines([record]))) == [row]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (
            {"question": "a", "reply": "b"},
            r"line 2: has question, reply: a row needs instruction and output \(input and",
        ),
        ({"instruction": "a"}, "line 2: has instruction: a row needs"),
        ({"prompt": "a", "completion": None}, "line 2: has prompt, completion \\(null\\): a row needs"),
        ({}, "line 2: has no field at all: a row needs"),
        (["a", "b"], "line 2: is a list, not an object with fields: a row needs instruction and output"),
        ({"instruction": "a", "output": 3}, "line 2: output is 3: it must be text"),
        ({"instruction": ["a"], "output": "b"}, r"line 2: instruction is \['a'\]: it must be text"),
        ({"instruction": "a", "input": 1, "output": "b"}, "line 2: input is 1: it must be text"),
        ({"instruction": "a", "output": "b", "answer": True}, "line 2: answer is True: it must be text"),
        (
            {"messages": "a"},
            "line 2: messages must be a list of turns, each with a role and its content as text",
        ),
        ({"messages": [{"role": "user"}]}, "line 2: messages must be a list of turns"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "line 2: messages has the turns user: a row holds one",
        ),
        (
            {"messages": []},
            r"line 2: messages has the turns \(none\): a row holds one question and its reply",
        ),
        (
            {
                "messages": [
                    {"role": one, "content": "a"} for one in ("user", "assistant", "user", "assistant")
                ]
            },
            "line 2: messages has the turns user, assistant, user, assistant: a row holds one question",
        ),
        (
            RECORDS[0] | {"images": ["a.png"]},
            r"line 2: has images, and moa reads text alone: .* TRL's SFTTrainer with the model's processor",
        ),
        ({"instruction": "a\ud83d", "output": "b"}, "line 2: instruction holds half of a character"),
        (
            RECORDS[0] | {"history": [["a", "b"]]},
            "line 2: has history, which moa does not read: a row holds one",
        ),
        (RECORDS[0] | {"tools": '[{"name": "add"}]'}, "line 2: has tools, which moa does not read"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]},
                ]
            },
            "line 2: has tool_calls, which moa does not read",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "thinking": "c"},
                ]
            },
            "line 2: has thinking, which moa does not read",
        ),
        (
            {
                "system": "s",
                "messages": [{"role": one, "content": "a"} for one in ("system", "user", "assistant")],
            },
            "line 2: has a system turn, and another text in system: keep one",
        ),
    ],
)
def test_a_record_that_is_no_row_is_named_with_its_line(tmp_path: Path, record: Any, says: str) -> None:
    source = write(tmp_path / "a.jsonl", as_lines([RECORDS[0], record]))
    with pytest.raises(UsageError, match=says):
        load_rows(source)
    assert load_rows(source, limit=1) == ROWS[:1]


def test_a_record_of_a_list_is_named_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.json, row 3: has text: a row needs"):
        load_rows(write(tmp_path / "a.json", json.dumps([*RECORDS[:2], {"text": "x"}])))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "a.jsonl",
            as_lines(RECORDS[:2]) + '{"instruction": \n',
            r"a\.jsonl, line 3: not JSON: Expecting value at column",
        ),
        (
            "a.json",
            '[\n{"instruction": "a"},\n{"output" "b"}]',
            r"a\.json, line 3: not JSON: Expecting ':' delimiter",
        ),
        (
            "a.json",
            as_lines(RECORDS),
            r"line 2: not JSON: .*; if it is one object a line, let its name end in \.jsonl",
        ),
        ("a.jsonl", "[" * 9999 + "\n", r"a\.jsonl, line 1: cannot be read: "),
        ("a.json", f"[{'9' * 5000}]", r"a\.json cannot be read: "),
        ("a.json", '{"a": 1}', r"a\.json holds one dict: it should be a list of rows"),
        ("a.json", " \n", r"a\.json is empty"),
        ("a.json", "[]", r"a\.json' holds no rows \(split 'train'\)"),
        ("a.jsonl", "\n\n", r"a\.jsonl' holds no rows"),
        ("a.txt", "x", r"a\.txt is of an unknown kind: its name must end in \.json, \.jsonl"),
    ],
)
def test_a_file_that_is_not_rows_says_why(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_rows(write(tmp_path / name, text))


def test_a_truncated_or_false_gzip_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    write(file, as_lines(RECORDS * 50))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UsageError, match=r"a\.jsonl\.gz is not a whole gzip file"):
        load_rows(str(file))
    file.write_text(as_lines(RECORDS))
    with pytest.raises(UsageError, match=r"a\.jsonl\.gz is not a whole gzip file"):
        load_rows(str(file))


def test_a_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'[{"instruction": "\xff"}]')
    with pytest.raises(UsageError, match=r"a\.json is not UTF-8 text: invalid start byte"):
        load_rows(str(file))


def test_a_file_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.json", json.dumps(RECORDS))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", source)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError, match=r"a\.json cannot be read: Permission denied"):
        load_rows(source)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere.json", r"data file nowhere\.json does not exist"),
        (
            "./nowhere",
            r"data '\./nowhere' does not exist: give a file, a folder, 'demo' or the name of a dataset",
        ),
        ("some/deep/folder", "data 'some/deep/folder' does not exist"),
        ("", "data '' does not exist"),
    ],
)
def test_a_source_that_is_not_there_is_an_error(source: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_rows(source)


def test_a_folder_with_the_name_of_a_file_is_not_read_as_one(tmp_path: Path) -> None:
    (tmp_path / "folder" / "train.json").mkdir(parents=True)
    from moa_peft.data.loading import read_records

    with pytest.raises(UsageError, match=r"train\.json is not a file"):
        next(iter(read_records(tmp_path / "folder" / "train.json")))


@pytest.mark.parametrize("limit", [0, -3, 10**23])
def test_a_limit_below_one_or_beyond_any_list_is_an_error(limit: int) -> None:
    with pytest.raises(UsageError, match=f"limit is {limit}: give at least 1"):
        load_rows("demo", limit=limit)


def test_a_folder_saved_by_datasets_is_read(tmp_path: Path) -> None:
    import datasets

    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(RECORDS[:3]), "test": datasets.Dataset.from_list(RECORDS[3:])}
    )
    both.save_to_disk(str(tmp_path / "saved"))
    assert load_rows(str(tmp_path / "saved"), split="test", limit=1) == ROWS[3:4]
    with pytest.raises(UsageError, match=r"unknown split 'dev': known: test, train \(in '.*saved'\)"):
        load_rows(str(tmp_path / "saved"), split="dev")
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "single"))
    assert load_rows(str(tmp_path / "single")) == ROWS


def test_a_folder_that_datasets_cannot_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no row files, and `datasets` cannot load it: "):
        load_rows(str(tmp_path))


def test_a_name_and_its_config_are_given_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str | None]] = []

    def load(name: str, config: str | None) -> dict[str, list[dict[str, str]]]:
        asked.append((name, config))
        return {"train": RECORDS, "odd": [{"text": "x"}]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_rows("owner/name:main", limit=2) == ROWS[:2]
    assert load_rows("name") == ROWS
    assert asked == [("owner/name", "main"), ("name", None)]
    with pytest.raises(UsageError, match="owner/name, split odd, row 1: has text: a row needs"):
        load_rows("owner/name", split="odd")


def test_a_name_that_datasets_cannot_find_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def load(name: str, config: str | None) -> None:
        raise DatasetNotFoundError("not on the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        UsageError,
        match=r"data 'nobody' is no file or folder, and `datasets` cannot load it: not on the hub$",
    ):
        load_rows("nobody")
