"""The rows of a run: read, split, identified, and made into the trainer's datasets."""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from moa_peft.data.loading import load_rows
from moa_peft.data.row import Row, rows_md5
from moa_peft.data.tokenization import encode_rows
from moa_peft.errors import UsageError
from moa_peft.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """What a recipe's data holds, before a tokenizer has seen it."""

    recipe: Recipe
    """The recipe, with the MD5 of its rows."""
    train: list[Row]
    """Rows to train on."""
    validation: list[Row] | None
    """Held-out rows; None when the recipe asks for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRows:
    """The trainer's datasets, columns ``input_ids`` and ``labels``."""

    train: Dataset
    """Examples to train on."""
    validation: Dataset | None
    """Held-out examples; None for none."""
    dropped: int
    """Training rows left out, because their answers would be cut away."""
    cut: int
    """Training rows whose answers lose their end."""
    validation_dropped: int
    """Held-out rows left out, because their answers would be cut away."""


def read_rows(recipe: Recipe) -> Rows:
    """Read a recipe's rows and hold out what it asks for.

    Args:
        recipe: The recipe.

    Returns:
        The rows.

    Raises:
        UsageError: If the rows cannot be read, are not those of ``data_md5`` and ``validation_md5``, or are too few
            for the held-out share.
    """
    rows = load_rows(recipe.data, split=recipe.data_split or "train", limit=recipe.limit)
    recipe = dataclasses.replace(recipe, data_md5=_identified(rows, recipe, "data", "data, split and limit"))
    if isinstance(recipe.validation, str):
        held_out = load_rows(recipe.validation, split="validation", limit=None)
        md5 = _identified(held_out, recipe, "validation", "validation rows")
        recipe = dataclasses.replace(recipe, validation_md5=md5)
        return Rows(recipe=recipe, train=rows, validation=held_out)
    if recipe.validation is None:
        return Rows(recipe=recipe, train=rows, validation=None)
    train, held_out = hold_out(rows, recipe.validation, recipe.seed)
    return Rows(recipe=recipe, train=train, validation=held_out)


def _identified(rows: Sequence[Row], recipe: Recipe, key: str, same: str) -> str:
    """The MD5 of the rows of a key; another one than the recipe's is an error. A resumed run compares it itself."""
    md5, wanted = rows_md5(rows), getattr(recipe, f"{key}_md5")
    if wanted is not None and wanted != md5 and not recipe.resume:
        raise UsageError(
            f"the rows of {getattr(recipe, key)} have MD5 {md5}, the recipe's {key}_md5 is {wanted}: give the same "
            f"{same}, or leave {key}_md5 out"
        )
    return md5


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out a share of the rows, drawn at random; both parts keep the order of the rows.

    Args:
        rows: The rows.
        share: Between 0 and 1; at least one row is held out.
        seed: Seed of the draw.

    Returns:
        Rows to train on, and rows held out.

    Raises:
        UsageError: If nothing would be left to train on.
    """
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise UsageError(
            f"validation holds out {count} of {len(rows)} rows: nothing is left to train on; give a smaller share"
        )
    chosen = set(random.Random(seed).sample(range(len(rows)), count))  # not for secrets
    train = [row for place, row in enumerate(rows) if place not in chosen]
    return train, [row for place, row in enumerate(rows) if place in chosen]


def encode(rows: Rows, tokenizer: Any) -> TrainingRows:
    """Tokenise rows, with labels on the answers alone.

    Args:
        rows: The rows.
        tokenizer: The base model's.

    Returns:
        The datasets.

    Raises:
        UsageError: If no row has an answer left within ``max_length``.
    """
    train = encode_rows(rows.train, tokenizer, rows.recipe.template, rows.recipe.max_length)
    validation, validation_dropped = None, 0
    if rows.validation is not None:
        held_out = encode_rows(
            rows.validation, tokenizer, rows.recipe.template, rows.recipe.max_length, "held-out rows"
        )
        validation, validation_dropped = _dataset(held_out.examples), held_out.dropped
    return TrainingRows(
        train=_dataset(train.examples),
        validation=validation,
        dropped=train.dropped,
        cut=train.cut,
        validation_dropped=validation_dropped,
    )


def _dataset(examples: Sequence[Any]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [list(one.input_ids) for one in examples],
            "labels": [list(one.labels) for one in examples],
        }
    )
