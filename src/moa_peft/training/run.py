"""The training run: from a recipe to an adapter, its card, its checkpoints and a row of results."""

import json
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from moa_peft.data.base_loading import auto_class, base_config, model_fingerprint
from moa_peft.errors import UsageError, library_errors
from moa_peft.json_lines import RESULTS_FILE, append_rows
from moa_peft.provenance import RECIPE_FILE, provenance
from moa_peft.quiet import quiet_libraries
from moa_peft.training.checkpoints import forget_later_checkpoints, step_of
from moa_peft.training.model_card import write_card
from moa_peft.training.output_folder import disk_errors_named, replacing, write_text
from moa_peft.training.prepare import Plan, Preparation, RunSizes, TrainingOutcome, prepare
from moa_peft.training.recipe import Recipe
from moa_peft.training.trainer_settings import REFUSED_BY_TRAINER


def train(recipe: Recipe, on_plan: Callable[[Plan], None] | None = None) -> TrainingOutcome:
    """Fine-tune a model as a recipe says.

    Args:
        recipe: What to do.
        on_plan: Called with the plan before the first step.

    Returns:
        What came out. The folder ``output_dir`` then holds the adapter in PEFT's layout, the tokenizer,
        `moa_recipe.json`, a model card, one more row in `results.jsonl`, and the checkpoints.

    Raises:
        UsageError: If the recipe cannot be followed, or the loss stops being finite.
        OSError: If the disk is full or must not be written to.
    """
    preparation = prepare(recipe)
    if on_plan is not None:
        on_plan(preparation.plan)
    return run(preparation)


@library_errors(REFUSED_BY_TRAINER)
def run(preparation: Preparation) -> TrainingOutcome:
    """Train, and write what a run leaves. Whatever comes, the progress bar is closed and the folder given back.

    Args:
        preparation: What `prepare` gave; it can be run once.

    Returns:
        What came out.

    Raises:
        UsageError: If the loss stops being finite, or the trainer refuses a setting.
        OSError: If the disk is full or must not be written to.
    """
    with preparation.claim, closing(preparation.progress):
        return _run(preparation)


def _run(preparation: Preparation) -> TrainingOutcome:
    trainer, plan = preparation.trainer, preparation.plan
    folder = Path(plan.output_dir)
    written = preparation.recipe.to_mapping() | {"resume": False}
    main = trainer.is_world_process_zero()
    if main:
        write_text(folder / RECIPE_FILE, json.dumps(written, indent=2) + "\n")
        forget_later_checkpoints(folder, plan.resume_from)
    start = time.perf_counter()
    with quiet_libraries():
        if plan.resume_from is not None and step_of(Path(plan.resume_from)) >= plan.steps:
            trainer.restore(Path(plan.resume_from))
        else:
            trainer.train(resume_from_checkpoint=plan.resume_from)
        train_s = time.perf_counter() - start
        if not trainer.state.global_step:
            raise UsageError("the trainer has made no step: nothing was trained, and nothing is saved")
        trainer.refuse_non_finite()
        outcome = _outcome(preparation, train_s)
        row = _result_row(preparation, outcome, written) if main else {}
        with (
            disk_errors_named(folder),
            replacing(folder) if main else nullcontext(folder) as draft,
        ):
            trainer.save_model(str(draft), _internal_call=True)
            if main:
                (draft / "training_args.bin").unlink(missing_ok=True)
                write_card(draft, row, written, auto_class(base_config(preparation.base)).__name__)
    if main:
        append_rows(folder / RESULTS_FILE, [row])
    return outcome


def _outcome(preparation: Preparation, train_s: float) -> TrainingOutcome:
    trainer, plan = preparation.trainer, preparation.plan
    history = trainer.state.log_history
    # the loss of the first of several steps says nothing of the end
    first = min(1, trainer.state.global_step - 1)
    losses = [one["loss"] for one in history if "loss" in one and one["step"] > first]
    held_out = [one for one in history if "eval_loss" in one]
    validation_loss = held_out[-1]["eval_loss"] if held_out else None
    stale = (
        not held_out
        or held_out[-1]["step"] != trainer.state.global_step
        or trainer.args.load_best_model_at_end
    )
    if plan.validation_rows and stale:
        validation_loss = trainer.evaluate()["eval_loss"]
    return TrainingOutcome(
        **{one.name: getattr(plan, one.name) for one in fields(RunSizes)},
        steps=trainer.state.global_step,
        final_loss=losses[-1] if losses else None,
        validation_loss=validation_loss,
        step_s=preparation.clock.median(),
        train_s=train_s,
    )


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _result_row(preparation: Preparation, outcome: TrainingOutcome, recipe: dict[str, Any]) -> dict[str, Any]:
    parameters = list(preparation.trainer.wrapped.parameters())
    return {
        "kind": "train",
        **{name: recipe[name] for name in ("method", "seed", "data", "data_md5")},
        "base_model": recipe["model"],
        "base_file_sha256": model_fingerprint(preparation.base),
        "base_dtype": _dtype_name(next(one for one in parameters if not one.requires_grad)),
        "adapter_dtype": _dtype_name(next(one for one in parameters if one.requires_grad)),
        **asdict(outcome),
        "resumed_from": preparation.plan.resume_from,
        **provenance(),
        "recipe": recipe,
    }
