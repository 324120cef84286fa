"""Going on with a run that was cut off: from where, and only with the recipe it was started with."""

import json
from pathlib import Path
from typing import Any

from moa_peft.errors import UsageError
from moa_peft.training import checkpoints
from moa_peft.training.output_folder import read_recipe
from moa_peft.training.recipe import Recipe

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
        "eval_strategy",
        "eval_steps",
        "per_device_eval_batch_size",
        "dataloader_num_workers",
        "dataloader_pin_memory",
    )
)
"""Keys that may differ when a run is resumed: none changes a step of training. ``data`` is compared by its rows."""

_CHOOSE_THE_BEST = frozenset(
    ("save_steps", "save_strategy", "eval_strategy", "eval_steps", "per_device_eval_batch_size")
)
"""Keys that decide which checkpoint is the best one, where a run ends with that (``load_best_model_at_end``)."""


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Name the keys that differ between the recipe of a run and the one it is resumed with.

    Args:
        old: The recipe that the run wrote down.
        new: The recipe given now, with the MD5 of its rows.

    Returns:
        Names of keys that would change the weights or the figures; rows that changed are called "data" or
        "validation".
    """
    new = json.loads(json.dumps(new))  # as the old one was written: keys as text, tuples as lists
    old = {"validation_md5": new.get("validation_md5"), **old}  # runs of before it was written down
    free = FREE_ON_RESUME - (_CHOOSE_THE_BEST if new.get("load_best_model_at_end") else frozenset())
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key) and key not in free]
    return [key.removesuffix("_md5") for key in differing]


def find_resumption(recipe: Recipe, folder: Path) -> tuple[Path | None, tuple[Path, ...]]:
    """Find the checkpoint to go on from.

    Args:
        recipe: The recipe given now, with the MD5 of its rows.
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
    return checkpoints.choose(folder, recipe.resume), checkpoints.find_checkpoints(folder).incomplete


def forget_later_checkpoints(folder: Path, resume_from: str | None) -> None:
    """Take the mark off checkpoints after the one gone on from: they are about to be written anew."""
    for one in checkpoints.find_checkpoints(folder).complete:
        if resume_from is not None and checkpoints.step_of(one) > checkpoints.step_of(Path(resume_from)):
            checkpoints.unmark(one)
