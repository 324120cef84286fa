"""Checkpoints: which of a run's are complete, and which one a resumed run continues from.

A checkpoint is a folder of several files, and a run may be killed between any two of them. So a manifest of the
folder's files and sizes is written last; a folder without one, or that differs from it, was cut off.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_peft.errors import UsageError, expanded
from moa_peft.json_lines import read_object
from moa_peft.training.output_folder import read_recipe
from moa_peft.training.recipe import Recipe

MANIFEST = "complete.json"
_NAME = re.compile(r"checkpoint-([0-9]+)")
_OPTIMIZER_FILES = ("optimizer*", "global_step*")
"""Where the trainer keeps the optimizer's state: its own file or FSDP's, and DeepSpeed's folder."""


FREE_ON_RESUME = frozenset(
    (
        "data",
        "output_dir",
        "resume",
        "report_to",
        "run_name",
        "disable_tqdm",
        "project",
        "trackio_space_id",
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "per_device_eval_batch_size",
        "dataloader_num_workers",
        "dataloader_pin_memory",
    )
)
"""Keys that may differ when a run is resumed: none changes a step of training. ``data`` is compared by its rows."""


_CHOOSE_THE_BEST = frozenset(("save_steps", "save_strategy"))
"""Keys that decide which checkpoint is the best one, where a run ends with that (``load_best_model_at_end``)."""


def moved(checkpoint: str, folder: Path) -> str:
    """Where a checkpoint that a state names lies now that its run is in ``folder``."""
    return str(folder / Path(checkpoint).name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """The checkpoints of a run, oldest first."""

    complete: tuple[Path, ...]
    """Folders with all the files that their manifest names."""

    incomplete: tuple[Path, ...]
    """Folders that were being written, or deleted, when the run ended."""


def find_checkpoints(output_dir: Path) -> Checkpoints:
    """Sort the checkpoints of a run into complete and incomplete ones.

    Args:
        output_dir: The run's folder; it need not exist.

    Returns:
        Both kinds, by step.
    """
    found = [one for one in output_dir.glob("checkpoint-*") if _NAME.fullmatch(one.name) and one.is_dir()]
    found.sort(key=step_of)
    whole = {one: is_complete(one) for one in found}
    return Checkpoints(
        complete=tuple(one for one in found if whole[one]),
        incomplete=tuple(one for one in found if not whole[one]),
    )


def step_of(checkpoint: Path) -> int:
    """The number of optimiser steps that a checkpoint's name states."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match, f"not a checkpoint: {checkpoint}"
    return int(match.group(1))


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder holds every file of its manifest, each of the size given there."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["sizes"]
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def mark_complete(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint whose files are all written. The files reach the disk before it does.

    Args:
        checkpoint: The folder.
    """
    files = sorted(one for one in checkpoint.rglob("*") if one.is_file() and one.name != MANIFEST)
    for one in files:
        _flush(one)
    sizes = {one.relative_to(checkpoint).as_posix(): one.stat().st_size for one in files}
    draft = checkpoint / f".{MANIFEST}"
    draft.write_text(json.dumps({"sizes": sizes}, indent=1) + "\n", encoding="utf-8")
    _flush(draft)
    draft.replace(checkpoint / MANIFEST)


def unmark(checkpoint: Path) -> None:
    """Remove the manifest, before the folder is rewritten or deleted."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)


def prune(output_dir: Path, keep: int | None, spare: str | None = None) -> None:
    """Delete old checkpoints. Call it once the newest one is complete, so that one is left at any moment.

    Args:
        output_dir: The run's folder.
        keep: Complete checkpoints to keep, the newest ones, at least 1; None keeps all.
        spare: One more to keep, as the best of a run; None for none.
    """
    if keep is None:
        return
    found = find_checkpoints(output_dir)
    for one in [*found.complete[: -max(keep, 1)], *found.incomplete]:
        if spare is None or one.resolve() != Path(spare).resolve():
            unmark(one)  # cut off in the middle of its deletion, it must not pass as complete
            shutil.rmtree(one)


def choose(output_dir: Path, resume: bool | str) -> Path | None:
    """Choose the checkpoint to resume from.

    Args:
        output_dir: The run's folder.
        resume: True for the last complete one, or the name or path of one in that folder.

    Returns:
        The checkpoint's folder; None when the run was cut off before its first one was complete, so that it starts
        over.

    Raises:
        UsageError: If the one named is not a complete checkpoint of this run.
    """
    complete = find_checkpoints(output_dir).complete
    if isinstance(resume, str):
        path = expanded(resume).resolve()
        wanted = [one for one in complete if one.name == resume or one.resolve() == path]
        if not wanted:
            known = f"complete are {names(complete)}" if complete else "it has none"
            raise UsageError(f"{resume} is not a complete checkpoint of the run in {output_dir}: {known}")
        return wanted[0]
    return complete[-1] if complete else None


def check_state(checkpoint: Path) -> None:
    """Check that training can go on from a checkpoint as if it had never stopped.

    Raises:
        UsageError: If it holds weights alone (``save_only_model``): optimizer and schedule would start over.
    """
    if not any(any(checkpoint.glob(pattern)) for pattern in _OPTIMIZER_FILES):
        raise UsageError(
            f"{checkpoint} holds no state of the optimizer, as save_only_model leaves it out: optimizer and schedule would "
            "start over; start a new run in another output_dir"
        )


def check_size(checkpoint: Path, steps: int, processes: int) -> None:
    """Check that a run has as many steps and processes as the one that a checkpoint is of.

    Raises:
        UsageError: If not: its schedule, and the rows of each step, would be others.
    """
    before = (read_object(checkpoint / "trainer_state.json") or {}).get("max_steps", steps)
    if before != steps:
        raise UsageError(
            f"{checkpoint} is of a run of {before:,} steps, this one has {steps:,}: resume it with as many processes and rows in a "
            "batch as it had (auto_find_batch_size may have halved these)"
        )
    started = len([*checkpoint.glob("rng_state*.pth")])
    if started not in (0, processes):
        raise UsageError(
            f"{checkpoint} is of a run in {started} process{'es' if started > 1 else ''}, and these are {processes}: start as many"
        )


def names(checkpoints: Sequence[Path]) -> str:
    """The folders' names, for a message."""
    return ", ".join(one.name for one in checkpoints)


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Name the keys that differ between the recipe of a run and the one it is resumed with.

    Args:
        old: The recipe in the run's folder.
        new: The new recipe, with the MD5 of its rows.

    Returns:
        Names of keys that would change the weights or the figures; rows that changed are called "data" or
        "validation".
    """
    new = json.loads(json.dumps(new))  # as the old one was written: keys as text, tuples as lists
    loaded_before, loaded_now = (one.get("model_init_kwargs") or {} for one in (old, new))
    if "dtype" in loaded_before:  # a run writes down the dtype that it found
        loaded_now = {"dtype": loaded_before["dtype"], **loaded_now}
    # earlier runs did not record the MD5 of validation rows
    old = {"validation_md5": new.get("validation_md5"), **old, "model_init_kwargs": loaded_before}
    new = {**new, "model_init_kwargs": loaded_now}
    free = FREE_ON_RESUME - (_CHOOSE_THE_BEST if new.get("load_best_model_at_end") else frozenset())
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key) and key not in free]
    return [key.removesuffix("_md5") for key in differing]


def find_resumption(recipe: Recipe, folder: Path) -> tuple[Path | None, tuple[Path, ...]]:
    """Find the checkpoint that a recipe resumes from.

    Args:
        recipe: The new recipe, with the MD5 of its rows.
        folder: The run's folder.

    Returns:
        The checkpoint, and the incomplete ones left out; nothing for a new run.

    Raises:
        UsageError: If the folder holds no run, the recipe has changed, or the checkpoint named is not complete.
    """
    if not recipe.resume:
        return None, ()
    changed = changed_keys(read_recipe(folder), recipe.to_mapping())
    if changed:
        raise UsageError(
            f"the run in {folder} was started with other values of {', '.join(changed)}: resume it with its own "
            "recipe (moa_recipe.json in that folder), or start a new run in another output_dir"
        )
    if recipe.trainer.get("train_sampling_strategy") == "group_by_length":
        raise UsageError(
            "train_sampling_strategy is group_by_length, whose order of rows a resumed run cannot find again: start a new run"
        )
    return choose(folder, recipe.resume), find_checkpoints(folder).incomplete


def forget_later_checkpoints(folder: Path, resume_from: str | None) -> None:
    """Unmark checkpoints after the one resumed from: they will be rewritten."""
    for one in find_checkpoints(folder).complete:
        if resume_from is not None and step_of(one) > step_of(Path(resume_from)):
            unmark(one)
