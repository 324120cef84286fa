"""The demo: fine-tune the embedded model on real questions and hold it against the frozen one."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_peft.evaluation.loading import RECIPE_FILE, load, read_adapter
from moa_peft.evaluation.options import EvaluationOptions
from moa_peft.evaluation.results import paired_difference
from moa_peft.evaluation.run import TaskResult, evaluate
from moa_peft.evaluation.tasks import load_tasks
from moa_peft.provenance import provenance
from moa_peft.training.output_folder import append_result
from moa_peft.training.prepare import Plan, TrainingOutcome
from moa_peft.training.recipe import Recipe
from moa_peft.training.run import train

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """Frozen against tuned, on the same held-out questions."""

    training: TrainingOutcome
    frozen: TaskResult
    tuned: TaskResult
    loss_gain: float
    """Mean of frozen minus tuned answer loss, question by question, nats a token; above 0 is better."""
    loss_gain_error: float
    """Standard error of that mean."""
    accuracy_gain: float
    """Tuned minus frozen accuracy."""
    accuracy_gain_error: float
    """Standard error of that difference, paired by question."""


def demo_recipe(method: str, steps: int, output_dir: Path) -> Recipe:
    """The demo's training run: the paper's settings, on few steps of eight questions."""
    return Recipe(
        data="demo",
        method=method,
        output_dir=str(output_dir),
        resume=(output_dir / RECIPE_FILE).exists(),
        trainer={
            "max_steps": steps,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "save_steps": max(1, steps // 2),
            "logging_steps": 5,
        },
    )


def free_folder(folder: Path) -> Path:
    """The folder itself, or the first of folder-2, folder-3, ... that holds no finished run."""
    number, chosen = 1, folder
    while (chosen / ADAPTER_FILE).exists():
        number += 1
        chosen = folder.with_name(f"{folder.name}-{number}")
    return chosen


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
        folder: Where the run goes; a finished run there is left alone and the next free name is taken. What the frozen
            model gives is kept beside it and not computed twice.
        method: The method of the family.
        steps: Optimiser steps.
        tell: Called with a line before each part.
        on_plan: Called with the training plan.
        questions: Held-out questions to compare on; None for all 200.

    Returns:
        The comparison.

    Raises:
        UsageError: If the base model or the data cannot be had, or the disk does not take the results.
    """
    target = free_folder(folder)
    [task] = load_tasks("demo", limit=questions)
    frozen_options = EvaluationOptions(out=folder.with_name(f"{folder.name}-frozen"))
    tell(f"1/3  the frozen model on {len(task.questions)} held-out questions")
    base = load()
    frozen = evaluate(base.model, base.tokenizer, task, frozen_options)
    del base
    tell(f"2/3  {steps} steps of {method} on the training questions")
    training = train(demo_recipe(method, steps, target), on_plan)
    tell("3/3  the tuned model on the same held-out questions")
    tuned_model = load(adapter=read_adapter(str(target)))
    tuned_options = EvaluationOptions(out=target / "evaluation")
    tuned = evaluate(tuned_model.model, tuned_model.tokenizer, task, tuned_options)
    result = _compare(training, frozen, tuned)
    append_result(target, _row(result, method))
    return result


def _compare(training: TrainingOutcome, frozen: TaskResult, tuned: TaskResult) -> DemoResult:
    loss_gain, loss_error = paired_difference(frozen.losses(), tuned.losses())
    accuracy_gain, accuracy_error = paired_difference(tuned.correct(), frozen.correct())
    assert loss_error is not None, "the demo has more than one question"
    assert accuracy_error is not None, "the demo has more than one question"
    return DemoResult(
        training=training,
        frozen=frozen,
        tuned=tuned,
        loss_gain=loss_gain,
        loss_gain_error=loss_error,
        accuracy_gain=accuracy_gain,
        accuracy_gain_error=accuracy_error,
    )


def _row(result: DemoResult, method: str) -> dict[str, Any]:
    """One line of `results.jsonl`: the comparison, and enough to repeat it."""
    return {
        "kind": "demo",
        "method": method,
        "loss_gain": result.loss_gain,
        "loss_gain_error": result.loss_gain_error,
        "accuracy_gain": result.accuracy_gain,
        "accuracy_gain_error": result.accuracy_gain_error,
        "frozen": dataclasses.asdict(result.frozen.row),
        "tuned": dataclasses.asdict(result.tuned.row),
        "training": dataclasses.asdict(result.training),
        **provenance(),
    }
