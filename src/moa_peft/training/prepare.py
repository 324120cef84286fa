"""Preparing a run: everything is checked, loaded and counted before its first step."""

import copy
import dataclasses
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from transformers import PrinterCallback, ProgressCallback

from moa_peft.data.base_loading import (
    BaseSettings,
    find_base,
    load_base,
    load_tokenizer,
    longest_input,
    told_init_kwargs,
)
from moa_peft.data.tokenization import IGNORED
from moa_peft.errors import UsageError, expanded, library_errors
from moa_peft.folder_lock import claimed
from moa_peft.mixture.block_hooks import mixture_layers, mixtures_of
from moa_peft.mixture.placement import Placement, find_placements
from moa_peft.provenance import RECIPE_FILE
from moa_peft.quiet import quiet_libraries
from moa_peft.training.checkpoints import check_size, check_state, find_resumption, step_of
from moa_peft.training.output_folder import check_unused, sweep
from moa_peft.training.progress import OwnIntervals, ProgressLines, StepClock
from moa_peft.training.recipe import Recipe, build_peft_config, factors_of
from moa_peft.training.router_health import RouterFigures
from moa_peft.training.rows import TrainingRows, encode, read_rows
from moa_peft.training.trainer import AdapterTrainer
from moa_peft.training.trainer_settings import REFUSED_BY_TRAINER, build_settings, check_trainer

_LEAST_LOGS, _LEAST_CHECKPOINTS = 5, 20


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSizes:
    """What is known of a run before its first step, and still true of it at its end."""

    output_dir: str
    """Where the adapter, its card, the recipe, the results and the checkpoints lie."""
    rows_kept: int
    """Training rows."""
    rows_dropped: int
    """Rows left out, because max_length would cut their answers away."""
    rows_cut: int
    """Training rows whose answers lose their end at max_length."""
    validation_rows: int
    """Held-out rows; 0 for none."""
    validation_rows_dropped: int
    """Held-out rows left out, because max_length would cut their answers away."""
    trainable_parameters: int
    """Numbers that are trained."""
    total_parameters: int
    """Numbers in all, the frozen model's included."""
    placements: tuple[Placement, ...]
    """What each kind of block gets, and what has no place there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(RunSizes):
    """What a run will do, known before its first step."""

    method: str
    """The method of the family."""
    model: str
    """The base model, as the recipe names it."""
    steps: int
    """Optimiser steps of the whole run."""
    resume_from: str | None
    """The checkpoint gone on from; None for a start from the frozen model."""
    resumed: bool
    """Whether the recipe asks to go on with a run."""
    skipped: tuple[str, ...]
    """Incomplete checkpoints that a resumed run leaves out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOutcome(RunSizes):
    """What a run gave."""

    steps: int
    """Optimiser steps of the whole run, those before a resumption included."""
    final_loss: float | None
    """The training loss last logged, nats a token of the answers: a mean over the steps since the log before, or since the
    checkpoint that the run went on from, so that it is the same only where checkpoints lie at logged steps."""
    validation_loss: float | None
    """The held-out loss at the end, nats a token of the answers; None without held-out rows."""
    step_s: float | None
    """Median seconds a step of this process, without evaluation and saving; None when there was nothing left to do."""
    train_s: float
    """Seconds from the first step to the last, evaluation and saving included, of this process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """A run that is ready to start."""

    recipe: Recipe
    """The recipe, with the MD5 of its rows."""
    plan: Plan
    """What it will do."""
    base: BaseSettings
    """The base model."""
    trainer: AdapterTrainer
    """What will do it."""
    clock: StepClock
    """What takes its time."""
    progress: ProgressLines
    """What a person sees; opened by the first step."""
    claim: ExitStack
    """Holds the output folder until it is closed; a new folder that is still empty then goes."""


@library_errors(REFUSED_BY_TRAINER)
def prepare(recipe: Recipe) -> Preparation:
    """Check everything, load model and rows, and build the trainer. A failure leaves no new folder behind.

    Args:
        recipe: What to do.

    Returns:
        The run, ready to start; no other process can work in its folder until it has ended or is discarded.

    Raises:
        UsageError: If the recipe cannot be followed, or another process works in ``output_dir``.
        OSError: If ``output_dir`` cannot be written to.
    """
    recipe = dataclasses.replace(recipe, output_dir=str(expanded(recipe.output_dir)))
    check_trainer(recipe)
    build_peft_config(recipe)  # reports a wrong method before anything is loaded
    folder = Path(recipe.output_dir)
    with ExitStack() as claim:
        if is_main():
            claim.enter_context(claimed(folder))
            if (folder / RECIPE_FILE).is_file():
                sweep(folder)
            if not recipe.resume:
                check_unused(folder)
        with quiet_libraries():
            preparation = _prepare(recipe, folder)
        return dataclasses.replace(preparation, claim=claim.pop_all())


def is_main() -> bool:
    """Whether this process is the one that writes files; the only one, unless a launcher started several."""
    return os.environ.get("RANK", "0") == "0"


def _prepare(recipe: Recipe, folder: Path) -> Preparation:
    rows = read_rows(recipe)
    recipe = rows.recipe
    resume_from, skipped = find_resumption(recipe, folder)
    base = find_base(recipe.model, told_init_kwargs(recipe.to_mapping()))
    tokenizer = load_tokenizer(base)
    encoded = encode(rows, tokenizer)
    model = _load_model(base, tokenizer, recipe)
    _check_lengths(model, encoded, recipe)
    method = build_peft_config(recipe)
    placements = tuple(find_placements(model, method))
    trainer, clock, progress = _build_trainer(recipe, model, tokenizer, encoded)
    steps = _count_steps(trainer)
    if resume_from is not None:
        check_size(resume_from, steps, trainer.args.world_size)
        if step_of(resume_from) < steps:
            check_state(resume_from)
    recipe = _with_dtype(_with_intervals(recipe, trainer, steps), model)
    trained, total = trainer.wrapped.get_nb_trainable_parameters()
    plan = Plan(
        method=recipe.method,
        model=recipe.model,
        rows_kept=len(encoded.train),
        rows_dropped=encoded.dropped,
        rows_cut=encoded.cut,
        validation_rows=len(encoded.validation or ()),
        validation_rows_dropped=encoded.validation_dropped,
        trainable_parameters=trained,
        total_parameters=total,
        steps=steps,
        output_dir=recipe.output_dir,
        resume_from=None if resume_from is None else str(resume_from),
        resumed=bool(recipe.resume),
        skipped=tuple(one.name for one in skipped),
        placements=placements,
    )
    return Preparation(
        recipe=recipe,
        plan=plan,
        base=base,
        trainer=trainer,
        clock=clock,
        progress=progress,
        claim=ExitStack(),
    )


def _with_intervals(recipe: Recipe, trainer: AdapterTrainer, steps: int) -> Recipe:
    """Log and save a short run more often than the defaults do, so that it can be followed and resumed; the recipe goes first."""
    least = {"logging_steps": _LEAST_LOGS, "save_steps": _LEAST_CHECKPOINTS}
    if trainer.args.load_best_model_at_end:
        del least["save_steps"]
    found = {
        name: max(1, min(int(getattr(trainer.args, name)), steps // times))
        for name, times in least.items()
        if name not in recipe.trainer
    }
    for name, interval in found.items():
        setattr(trainer.args, name, interval)
    return dataclasses.replace(recipe, trainer={**recipe.trainer, **found})


def _with_dtype(recipe: Recipe, model: Any) -> Recipe:
    """Write down which dtype the base model came in, for whoever loads it later."""
    found = {"dtype": str(model.dtype).removeprefix("torch.")}
    told = found | (recipe.trainer.get("model_init_kwargs") or {})
    return dataclasses.replace(recipe, trainer={**recipe.trainer, "model_init_kwargs": told})


def _build_trainer(
    recipe: Recipe, model: Any, tokenizer: Any, encoded: TrainingRows
) -> tuple[AdapterTrainer, StepClock, ProgressLines]:
    settings = build_settings(
        copy.deepcopy(recipe), has_validation=encoded.validation is not None, cuda=torch.cuda.is_available()
    )
    peft_config = build_peft_config(recipe)
    peft_config.revision = (recipe.trainer.get("model_init_kwargs") or {}).get("revision")
    router = peft_config.router
    by_instance = router is not None and router.granularity == "instance"
    if by_instance and settings.packing and settings.packing_strategy == "wrapped":
        raise UsageError(
            "packing_strategy is wrapped, which joins examples to one sequence, and the method has one gate for each instance: give "
            "packing_strategy bfd"
        )
    trainer = AdapterTrainer(
        model=model,
        args=settings,
        train_dataset=encoded.train,
        eval_dataset=encoded.validation,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    if trainer.eval_dataset is not None and settings.world_size > 1:
        trainer.eval_dataset = _filled(trainer.eval_dataset, settings.eval_batch_size * settings.world_size)
    if any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
        for mixture in mixtures_of(trainer.wrapped):
            mixture.float()  # TRL has made it bfloat16, which rounds small steps away
    trainer.lr_factors = factors_of(recipe) or None
    trainer.keep_checkpoints = recipe.to_mapping()["save_total_limit"]
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    clock, progress = StepClock(), ProgressLines()
    trainer.add_callback(OwnIntervals())
    trainer.add_callback(clock)
    if not recipe.trainer.get("disable_tqdm"):
        trainer.add_callback(progress)
    layers = mixture_layers(trainer.wrapped)
    figures = RouterFigures(trainer.wrapped, layers)
    trainer.add_callback(figures)
    trainer.extra_figures = figures.collect
    return trainer, clock, progress


def _filled(held_out: Any, at_once: int) -> Any:
    """Held-out rows up to whole batches of all processes, by rows without an answer; accelerate would repeat some with theirs."""
    missing = -len(held_out) % at_once
    if not missing:
        return held_out
    without = held_out.select([0] * missing).map(lambda one: {"labels": [IGNORED] * len(one["labels"])})
    return concatenate_datasets([held_out, without.cast(held_out.features)])


def _load_model(base: BaseSettings, tokenizer: Any, recipe: Recipe) -> Any:
    """Load the base model, a float16 one in float32 unless fp16 scales the loss: small gradients would become 0."""
    model = load_base(base, tokenizer)
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"  # Llama 4 names one that it does not have, and TRL needs it
    if recipe.trainer.get("fp16") or all(one.dtype != torch.float16 for one in model.parameters()):
        return model
    if base.init_kwargs.get("dtype", "auto") != "auto" or getattr(model, "is_quantized", False):
        raise UsageError(
            f"the model {recipe.model!r} is in float16, whose small gradients become 0 where nothing scales the loss: give "
            "model_init_kwargs dtype float32 or bfloat16, or fp16 on a GPU"
        )
    return model.float()


def _check_lengths(model: Any, encoded: TrainingRows, recipe: Recipe) -> None:
    most = longest_input(model)
    parts = [one for one in (encoded.train, encoded.validation) if one is not None]
    longest = max(len(ids) for one in parts for ids in one["input_ids"])
    if recipe.trainer.get("packing") and recipe.trainer.get("packing_strategy") == "wrapped":
        longest = max(longest, recipe.max_length)  # other packed rows start anew at each example
    if most is not None and longest > most:
        raise UsageError(
            f"max_length is {recipe.max_length}, a row takes {longest} tokens, and the model reads {most}: give max_length {most}, or a "
            "model that reads more"
        )


def _count_steps(trainer: AdapterTrainer) -> int:
    settings = trainer.args
    rows, at_once = len(trainer.train_dataset), settings.train_batch_size  # type: ignore[arg-type]  # sized
    if not settings.accelerator_config.split_batches:  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]  # made by then
        at_once *= settings.world_size
    whole = rows // at_once if settings.dataloader_drop_last else math.ceil(rows / at_once)
    if not whole:
        raise UsageError(
            f"dataloader_drop_last leaves nothing to train on: the {rows} rows are fewer than the {at_once} of a batch; leave "
            "it out, or give a smaller per_device_train_batch_size"
        )
    if settings.max_steps > 0:
        return settings.max_steps
    return math.ceil(settings.num_train_epochs * math.ceil(whole / settings.gradient_accumulation_steps))
