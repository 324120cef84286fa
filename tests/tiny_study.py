"""A study of two methods, two seeds and two tasks on 64 training rows and a tiny random model, on the disk."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moa_peft.data.row import Row
from moa_peft.study.data import questions_md5
from moa_peft.study.one_run import Order, describe
from moa_peft.study.rows import RunRow, Scores
from tiny_lm import choice_rows, save_base, write_rows


def write_study(folder: Path) -> dict[str, Any]:
    """Write the model and the rows into a folder, and give the settings of a study on them."""
    save_base(folder / "base")
    rows = {"mix/train": named("train", 64), "mix/validation": named("held out", 12)}
    for task in ("first", "second"):
        rows[f"{task}/test"] = named(task, 20)
    for name, content in rows.items():
        write_rows(folder / f"{name}.json", content)
    return {
        "out": str(folder / "out"),
        "model": str(folder / "base"),
        "data_root": str(folder),
        "data": "mix",
        "tasks": "first,second",
        "baseline": "lora",
        "methods": [
            {"method": "soft-moa", "mixture": {"router": {"kind": "linear"}}},
            {"method": "lora", "mixture": {"experts": {0: {"rank": 4, "dropout": 0.1}}}},
        ],
        "seeds": [0, 1],
        "learning_rates": [0.003, 0.03],
        "test_limit": 16,
        "batch_size": 4,
        "max_length": 400,
        "trainer": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "save_steps": 4,  # at a logged step, so that the loss of a resumed run is a mean over the same steps
            "logging_steps": 4,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }


def named(name: str, count: int) -> Sequence[Row]:
    """Rows whose questions begin with a name, so that no two sets share one."""
    return [dataclasses.replace(row, instruction=f"{name} {row.instruction}") for row in choice_rows(count)]


def write_forgetting(folder: Path, count: int = 8) -> None:
    """Write a task whose choices are texts, as PIQA's rows have them."""
    rows = [
        Row(
            instruction=f"Please choose the correct solution to the question: goal {place}\n\n"
            f"Solution1: way {place}\n\nSolution2: road {place + 1}\n\nAnswer format: solution1/solution2",
            input="",
            output=f"the correct answer is solution{1 + place % 2}",
            answer=f"solution{1 + place % 2}",
        )
        for place in range(count)
    ]
    write_rows(folder / "piqa" / "test.json", rows)


def same_on_every_run(row: dict[str, Any]) -> dict[str, Any]:
    """A row of results without what depends on the moment, the machine's load and the place."""
    moment = ("step_ms", "peak_mem_mib", "train_s", "evaluate_s", "taken_at", "command", "threads")
    return {name: value for name, value in row.items() if name not in moment}


def tables(folder: Path) -> str:
    """The report of a study without its costs."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    before, rest = text.split("## Cost\n")
    return before + rest[rest.index("## Choices" if "## Choices" in rest else "## Learning rates") :]


def made_up_row(order: Order, correct: str = "10", **found: Any) -> RunRow:
    """The row of a run that was never run."""
    share = correct.count("1") / len(correct)
    scores = Scores(
        n=len(correct),
        md5="v",
        file_md5=None,
        mode="likelihood",
        extraction="sum",
        accuracy=share,
        standard_error=(share * (1 - share) / len(correct)) ** 0.5,
        answer_loss=1.0,
        answer_loss_standard_error=0.1,
        correct=correct,
    )
    tests = {
        one.name: dataclasses.replace(scores, md5=questions_md5(one), mode=mode)
        for some, mode in ((order.data.tests, scores.mode), (order.data.forgetting, "text"))
        for one in some
        if one.name in order.job.tests
    }
    return describe(order, {"validation": scores, "tests": tests, **found}, None)
