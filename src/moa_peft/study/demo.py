"""The demo: fine-tune the embedded model on film reviews and compare it with the frozen one."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moa_peft.data.demo import sentence_of
from moa_peft.errors import UsageError
from moa_peft.evaluation.loading import load, read_adapter
from moa_peft.evaluation.options import EvaluationOptions
from moa_peft.evaluation.results import paired_difference
from moa_peft.evaluation.run import TaskResult, evaluate
from moa_peft.evaluation.tasks import Task, load_tasks
from moa_peft.folder_lock import LOCK_FILE
from moa_peft.json_lines import RESULTS_FILE, append_rows, read_rows
from moa_peft.provenance import RECIPE_FILE, provenance
from moa_peft.training.checkpoints import changed_keys
from moa_peft.training.output_folder import read_recipe
from moa_peft.training.prepare import Plan, TrainingOutcome
from moa_peft.training.recipe import Recipe, build_peft_config
from moa_peft.training.run import train


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One held-out sentence, its sentiment in the data, and what both models answer."""

    sentence: str
    label: str
    frozen: str
    tuned: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """Frozen against tuned, on the same held-out sentences."""

    training: TrainingOutcome
    frozen: TaskResult
    tuned: TaskResult
    accuracy_gain: float
    """Tuned minus frozen accuracy."""
    accuracy_gain_error: float
    """Standard error of that difference, paired by sentence."""
    examples: tuple[Example, ...]
    """Three sentences: the first whose answer changed, then the first of the others."""
    seconds: float
    """Of the whole demo, loading included."""


def demo_recipe(method: str, steps: int, output_dir: Path) -> Recipe:
    """The demo's training run, `recipes/demo.yaml` in the repository; one that was begun there is resumed."""
    return Recipe(
        data="demo",
        method=method,
        output_dir=str(output_dir),
        max_length=128,
        resume=(output_dir / RECIPE_FILE).exists(),
        trainer={
            "max_steps": steps,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "save_steps": 12,
            "logging_steps": 5,
        },
    )


def choose_run(folder: Path, method: str, steps: int) -> Recipe:
    """The demo's run in the folder, or in the first of folder-2, folder-3, ... that has none, or this one cut off.

    Raises:
        UsageError: If there is no such method, or something else is in the folder.
    """
    number, chosen = 1, folder
    while True:
        recipe = demo_recipe(method, steps, chosen)
        build_peft_config(recipe)
        if not recipe.resume:
            if chosen.is_file() or any(one.name != LOCK_FILE for one in chosen.glob("*")):
                raise UsageError(f"{chosen} holds something else than a run of the demo: give another --out")
            return recipe
        old = read_recipe(chosen)
        rows = {key: old.get(key) for key in ("data_md5", "validation_md5")}
        is_done = any(one.get("kind") == "demo" for one in read_rows(chosen / RESULTS_FILE))
        if not is_done and not changed_keys(old, recipe.to_mapping() | rows):
            return recipe
        number += 1
        chosen = folder.with_name(f"{folder.name}-{number}")


def run_demo(
    folder: Path,
    method: str,
    steps: int,
    tell: Callable[[str], None],
    on_plan: Callable[[Plan], None],
    questions: int | None = None,
) -> DemoResult:
    """Evaluate the frozen model, fine-tune it, evaluate it again, and append the comparison to `results.jsonl`.

    Args:
        folder: Where the run goes; a finished run there, or one of other settings, is left alone and the next free name is
            taken. What the frozen model gives is kept beside it and not computed twice.
        method: The method of the family.
        steps: Optimiser steps.
        tell: Called with a line before each part.
        on_plan: Called with the training plan.
        questions: Held-out sentences to compare on, at least 2; None for all 200.

    Returns:
        The comparison.

    Raises:
        UsageError: If there is no such method, the folder holds something else, the base model or the data cannot be had, or the
            disk does not take the results.
    """
    start = time.perf_counter()
    recipe = choose_run(folder, method, steps)
    target = Path(recipe.output_dir)
    [task] = load_tasks("demo", limit=questions)
    tell(f"1/3  the frozen model on {len(task.questions)} held-out sentences")
    base = load()
    out = folder.with_name(f"{folder.name}-frozen")
    frozen = evaluate(base.model, base.tokenizer, task, EvaluationOptions(out=out))
    del base
    tell(f"2/3  {steps} steps of {method} on the training sentences")
    training = train(recipe, on_plan)
    tell("3/3  the tuned model on the same held-out sentences")
    best = load(adapter=read_adapter(str(target)))
    tuned = evaluate(best.model, best.tokenizer, task, EvaluationOptions(out=target / "evaluation"))
    gain, error = paired_difference(tuned.correct(), frozen.correct())
    assert error is not None, "the demo has more than one sentence"
    result = DemoResult(
        training=training,
        frozen=frozen,
        tuned=tuned,
        accuracy_gain=gain,
        accuracy_gain_error=error,
        examples=choose_examples(task, frozen, tuned),
        seconds=round(time.perf_counter() - start, 1),
    )
    row = {"kind": "demo", "method": method, **dataclasses.asdict(result), **provenance()}
    append_rows(target / RESULTS_FILE, [row | {"frozen": row["frozen"]["row"], "tuned": row["tuned"]["row"]}])
    return result


def choose_examples(task: Task, frozen: TaskResult, tuned: TaskResult) -> tuple[Example, ...]:
    """Choose three sentences in the order of the task, those first whose answer changed, for better or worse."""
    examples = [
        Example(
            sentence=sentence_of(question.row),
            label=question.row.answer,
            frozen=before["extracted"][frozen.row.extraction],
            tuned=after["extracted"][tuned.row.extraction],
        )
        for question, before, after in zip(task.questions, frozen.examples, tuned.examples, strict=True)
    ]
    return tuple(sorted(examples, key=lambda one: one.frozen == one.tuned)[:3])
