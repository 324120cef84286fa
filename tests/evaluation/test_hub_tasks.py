"""Rows in the form of the hub, from local folders: what they become is checked against the official files."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from moa_peft.data.loading import load_rows
from moa_peft.data.row import Row
from moa_peft.errors import UsageError
from moa_peft.evaluation.hub_tasks import HUB, official_row
from moa_peft.evaluation.tasks import load_task, load_tasks

DATA = Path(__file__).parents[2] / "../shared/data"
RECORDS: dict[str, dict[str, Any]] = {
    "boolq": {
        "question": "does ethanol take more energy make that produces",
        "answer": False,
        "passage": "All",
    },
    "piqa": {
        "goal": "dresser",
        "sol1": "replace drawer with bobby pin ",
        "sol2": "finish, woodgrain with  bobby pin ",
        "label": 1,
    },
    "social_i_qa": {
        "context": "Tracy didn't go home that evening and resisted Riley's attacks.",
        "question": "What does Tracy need to do before this?",
        "answerA": "make a new plan",
        "answerB": "Go home and see Riley",
        "answerC": "Find somewhere to go",
        "label": "3",
    },
    "hellaswag": {
        "ind": 24,
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he",
        "endings": [
            "is using wrap to wrap a pair of skis.",
            "is ripping level tiles off.",
            "is holding a rubik's cube.",
            "starts pulling up roofing on a roof.",
        ],
        "label": "3",
    },
    "winogrande": {
        "sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
        "option1": "Sarah",
        "option2": "Maria",
        "answer": "2",
    },
    "ARC-Easy": {
        "id": "1",
        "question": "Which piece of safety equipment is used to keep mold spores from entering the respiratory system?",
        "choices": {
            "text": ["safety goggles", "breathing mask", "rubber gloves", "lead apron"],
            "label": ["1", "2", "3", "4"],
        },
        "answerKey": "2",
    },
    "openbookqa": {
        "id": "8-376",
        "question_stem": "There is most likely going to be fog around:",
        "choices": {"text": ["a marsh", "a tundra", "the plains", "a desert"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
    },
}
"""One row of each, of those whose official form is in the data folder."""


def official_rows(name: str) -> list[dict[str, str]]:
    for file in (DATA / name / "test.json", DATA / name / "test.json.gz"):
        if file.is_file():
            content = file.read_bytes()
            return json.loads(gzip.decompress(content) if file.name.endswith(".gz") else content)
    pytest.skip(f"the data folder with {name} is not beside the checkout")


def write(folder: Path, records: list[dict[str, Any]], split: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


@pytest.mark.parametrize("name", RECORDS)
def test_a_row_of_the_hub_becomes_the_official_row_letter_by_letter(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / name, [RECORDS[name]], HUB[name].split)
    task = load_task(str(folder))
    assert (task.name, task.split) == (name, HUB[name].split)
    (question,) = task.questions
    row = {one: getattr(question.row, one) for one in ("instruction", "input", "output", "answer")}
    assert row in official_rows(name)
    assert question.completions


def test_the_answer_of_gsm8k_is_what_follows_its_mark() -> None:
    record = {"question": "How many?", "answer": "He has 5*10=<<5*10=50>>50.\nTwice: 1,000.\n#### 1,000"}
    assert official_row(record, "row 1") == Row(
        instruction="How many?",
        input="",
        output="\nA: He has 5*10=50.\nTwice: 1,000. The answer is 1000.",
        answer="1000",
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("piqa", {"label": -1}),
        ("social_i_qa", {"label": ""}),
        ("hellaswag", {"label": ""}),
        ("winogrande", {"answer": ""}),
        ("winogrande", {"answer": "3"}),
        ("ARC-Easy", {"answerKey": ""}),
        ("openbookqa", {"choices": {"text": []}}),
        ("boolq", {"answer": "maybe"}),
    ],
)
def test_a_row_without_its_answer_is_named(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"row 7: the fields .* do not hold a question .*--split validation"):
        official_row(RECORDS[name] | change, "row 7")


def test_rows_of_other_forms_are_left_to_others() -> None:
    assert official_row({"instruction": "Q?", "output": "A", "answer": "A"}, "row 1") is None
    assert official_row({"prompt": "Q?", "completion": "A"}, "row 1") is None
    assert official_row([1], "row 1") is None
    assert official_row({"question": "How many?", "answer": "5"}, "row 1") is None, "gsm8k's have ####"
    own = {"instruction": "Q?", "output": "It is 5", "question": "Q?", "answer": "5"}
    assert official_row(own, "row 1") is None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """`datasets.load_dataset` on local files, and what it was asked for; no data folder."""
    asked: list[tuple[Any, ...]] = []
    records = RECORDS | {
        "ARC-Challenge": RECORDS["ARC-Easy"],
        "gsm8k": {"question": "Q?", "answer": "1\n#### 1"},
    }

    def load(name: str, config: str | None = None, **options: str) -> datasets.DatasetDict:
        asked.append((name, config, *options.values()))
        if name == "ybisk/piqa" and not options:
            raise RuntimeError("Dataset scripts are no longer supported, but found piqa.py")
        source = name if config is None else f"{name}:{config}"
        task = next(task for task, one in HUB.items() if one.source == source)
        rows = datasets.Dataset.from_list([records[task]] * 3)
        return datasets.DatasetDict({HUB[task].split: rows, "train": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    return asked


def test_without_a_data_root_the_tasks_come_from_the_hub(hub: list[tuple[Any, ...]], tmp_path: Path) -> None:
    tasks = load_tasks("commonsense,gsm8k", limit=2)
    assert [one.name for one in tasks] == [
        "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa", "gsm8k",
    ]  # fmt: skip
    assert all(len(one.questions) == 2 and one.file_md5 is None for one in tasks)
    assert [one.split for one in tasks] == ["validation"] * 5 + ["test"] * 4
    assert tasks[4].source == "allenai/winogrande:winogrande_xl"
    assert ("allenai/ai2_arc", "ARC-Challenge") in hub
    assert ("ybisk/piqa", None, "refs/convert/parquet") in hub, "the tables in the place of the program"
    (named,) = load_tasks("google/boolq")
    assert (named.name, named.split, len(named.questions)) == ("boolq", "validation", 3)
    (training,) = load_tasks("openai/gsm8k:main", split="train")
    assert (training.name, training.split) == ("gsm8k", "train")


def test_a_data_root_is_read_and_not_the_hub(hub: list[tuple[Any, ...]], tmp_path: Path) -> None:
    write(tmp_path / "data/boolq", [RECORDS["boolq"]], "test")
    (boolq,) = load_tasks("boolq", data_root=tmp_path / "data")
    assert boolq.source == str(tmp_path / "data/boolq")
    with pytest.raises(UsageError, match="task 'piqa' is not under the data root"):
        load_tasks("piqa", data_root=tmp_path / "data")


def test_a_task_that_the_hub_has_not_is_refused_with_what_it_has(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(UsageError, match=r"task 'AddSub' is not on the hub .*boolq.*--data-root"):
        load_tasks("math")
    assert not hub, "a mistake in a name is told before anything is loaded"


def test_another_failure_of_the_hub_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: object, **options: object) -> None:
        raise RuntimeError("the hub is away")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError, match="`datasets` cannot load it: the hub is away"):
        load_rows("someone/something", split="test")
