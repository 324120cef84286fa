"""The trainer's own settings: which there are, of what kind, and how a recipe becomes a `trl.SFTConfig`."""

import ast
import dataclasses
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from moa_peft.errors import UsageError
from moa_peft.training.recipe import REFUSED, TRAINER_DEFAULTS, Recipe, own_fields

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig


_PLAIN = (bool, int, float, str, dict, list)

_Range = tuple[Callable[[float], bool], str]

_COUNT: _Range = (lambda value: value >= 1, "a whole number of at least 1")
_FROM_0: _Range = (lambda value: 0 <= value < math.inf, "a number from 0")
_ABOVE_0: _Range = (lambda value: 0 < value < math.inf, "a number above 0")
_BELOW_1: _Range = (lambda value: 0 <= value < 1, "a number from 0 to below 1")

_RANGES: Mapping[str, _Range] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), _COUNT
    ),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps"), _FROM_0),
    "max_grad_norm": (lambda value: value >= 0, "a number from 0"),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps"), _ABOVE_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _BELOW_1),
}
"""Numbers that optimiser, loader or trainer would refuse only after everything is loaded, or not at all."""


@cache
def trainer_fields() -> dict[str, Any]:
    """Every field of `trl.SFTConfig` that a recipe may name, with its type."""
    from trl.trainer.sft_config import SFTConfig

    hints = typing.get_type_hints(SFTConfig)
    own = own_fields()
    return {
        one.name: hints[one.name] for one in dataclasses.fields(SFTConfig) if one.init and one.name not in own
    }


def switch_names() -> set[str]:
    """Fields of recipe and trainer that are true when their flag stands without a value."""
    return {"resume"} | {name for name, hint in trainer_fields().items() if bool in _choices(hint)}


def check_trainer(recipe: Recipe) -> None:
    """Check that every value for the trainer is of the kind that its field takes, and in its range.

    Raises:
        UsageError: If one is not; the message lists all of them.
    """
    hints = trainer_fields()
    ignored = _ignored(recipe.trainer)
    problems = [
        _problem(name, value, hints[name], any_number=name in ignored)
        for name, value in recipe.trainer.items()
    ]
    wrong = [one for one in problems if one is not None]
    if wrong:
        raise UsageError("recipe: " + "; ".join(wrong))


def build_settings(recipe: Recipe, *, has_validation: bool, cuda: bool) -> "SFTConfig":
    """Make the trainer's config: moa's defaults, then the recipe's values, then what moa decides itself.

    Args:
        recipe: The recipe, its values checked by `check_trainer`.
        has_validation: Whether there are held-out rows; they are then scored once an epoch unless the recipe says.
        cuda: Whether a CUDA device is there; without one, memory is not pinned.

    Returns:
        The config.

    Raises:
        UsageError: If the trainer refuses a value.
    """
    from trl.trainer.sft_config import SFTConfig

    values = {**TRAINER_DEFAULTS, "dataloader_pin_memory": cuda, "prediction_loss_only": True}
    if has_validation:
        values["eval_strategy"] = "epoch"
    values |= {key: value for key, value in recipe.trainer.items() if key not in REFUSED}
    values.pop("model_init_kwargs", None)  # the model is loaded before the trainer is made
    values["save_total_limit"] = None  # checkpoints.prune deletes old ones, once the new one is complete
    values["logging_nan_inf_filter"] = False
    packing = bool(values.get("packing"))
    try:
        return SFTConfig(
            output_dir=recipe.output_dir,
            seed=recipe.seed,
            max_length=recipe.max_length,
            dataset_kwargs={
                "skip_prepare_dataset": not packing
            },  # the rows are tokens already; packing is still due
            **values,
        )
    except (ValueError, TypeError, KeyError) as error:
        if values["bf16"] and "bf16" in str(error):  # it knows of more devices than CUDA's
            raise UsageError(
                "bf16 is true and no device here takes it: leave it out, or add use_cpu (--use_cpu true) to train in "
                "bfloat16 on the CPU"
            ) from error
        raise UsageError(f"the trainer refuses these settings: {' '.join(str(error).split())}") from error


def _choices(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _ignored(trainer: Mapping[str, Any]) -> set[str]:
    """The numbers that the trainer does not look at, beside what else is given."""
    ignored = {
        f"{what}_steps"
        for what, usual in (("save", "steps"), ("logging", "steps"), ("eval", "no"))
        if trainer.get(f"{what}_strategy", usual) != "steps"
    }
    most = trainer.get("max_steps")
    return ignored | ({"num_train_epochs"} if isinstance(most, int) and most > 0 else set())


def _problem(name: str, value: object, hint: Any, *, any_number: bool) -> str | None:
    if not _fits(value, hint):
        return f"{name} is {value!r}: give {_said(hint)}"
    if name in _RANGES and not any_number and isinstance(value, int | float):
        is_allowed, allowed = _RANGES[name]
        if not is_allowed(value):
            return f"{name} is {value}: give {allowed}"
    return None


def _fits(value: object, hint: Any) -> bool:
    choices = [typing.get_origin(one) or one for one in _choices(hint)]
    if value is None:
        return type(None) in choices
    if bool in choices and isinstance(value, bool):
        return True
    if isinstance(value, bool):
        return False
    if any(one not in (*_PLAIN, type(None)) for one in choices):
        return True  # an enum or a class: the trainer checks its value
    if float in choices and isinstance(value, int):
        return True
    return any(isinstance(value, one) for one in choices if one not in (bool, type(None)))


def _said(hint: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
    words |= {list: "a list", type(None): "null"}
    choices = [typing.get_origin(one) or one for one in _choices(hint)]
    return " or ".join(words[one] for one in choices if one in words)


def field_docs(config_class: type) -> dict[str, str]:
    """Read the string under each field of a dataclass.

    Args:
        config_class: A dataclass with one string literal under each field, its source at hand.

    Returns:
        The text of each field that has one, on one line, in the order of the fields.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(config_class)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs: dict[str, str] = {}
    for field, below in itertools.pairwise(body):
        is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if is_field and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[union-attr]  # is_field
    return docs
