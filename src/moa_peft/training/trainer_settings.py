"""The trainer's own settings: which there are, of what kind, and how a recipe becomes a `trl.SFTConfig`."""

import ast
import dataclasses
import inspect
import itertools
import math
import os
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_peft.errors import UsageError, library_errors
from moa_peft.training.recipe import REFUSED, TRAINER_DEFAULTS, Recipe, own_fields

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig


_PLAIN = (bool, int, float, str, dict, list)

_Range = tuple[Callable[[float], bool], str]

_COUNT: _Range = (lambda value: value >= 1, "a whole number of at least 1")
_FROM_0: _Range = (lambda value: 0 <= value < math.inf, "a number from 0")
_ABOVE_0: _Range = (lambda value: 0 < value < math.inf, "a number above 0")
_BELOW_1: _Range = (lambda value: 0 <= value < 1, "a number from 0 to below 1")
_PROCESSES: _Range = (lambda value: 0 <= value <= 256, "a whole number from 0 to 256")

_COUNTS = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit",
    "eval_accumulation_steps", "dataloader_prefetch_factor", "pad_to_multiple_of", "ddp_bucket_cap_mb", "ddp_timeout",
    "torch_empty_cache_steps",
)  # fmt: skip
_AMOUNTS = (
    "learning_rate",
    "weight_decay",
    "adam_epsilon",
    "warmup_steps",
    "eval_delay",
    "neftune_noise_alpha",
    "max_grad_norm",
)
_RANGES: Mapping[str, _Range] = {
    **dict.fromkeys(_COUNTS, _COUNT),
    **dict.fromkeys(_AMOUNTS, _FROM_0),
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 for num_train_epochs"),
    "data_seed": (lambda value: 0 <= value < 2**32, "a whole number from 0, below 2**32"),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps"), _ABOVE_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _BELOW_1),
    **dict.fromkeys(("dataloader_num_workers", "dataset_num_proc"), _PROCESSES),
}
"""Numbers that optimiser, loader or trainer would refuse only after everything is loaded, or not at all."""

_FILES = ("accelerator_config", "fsdp_config", "deepspeed")
"""Mappings that may also lie in a file."""

_WORDS: Mapping[str, tuple[Any, ...]] = {
    "include_num_input_tokens_seen": ("all", "non_padding", "no", True, False),
    "metric_for_best_model": ("loss", "eval_loss"),
    "pad_to_multiple_of": ("auto",),
    "debug": ("underflow_overflow", "tpu_metrics_debug"),
}
"""Words that the trainer does not look at, or only at its first evaluation, beside those that its fields list themselves."""

REFUSED_BY_TRAINER = "the trainer refuses these settings"


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
    hints, words = trainer_fields(), {**_field_words(), **_WORDS}
    ignored = _ignored(recipe.trainer)
    problems = [
        _problem(name, value, hints[name], words.get(name), any_number=name in ignored)
        for name, value in recipe.trainer.items()
    ]
    wrong = [one for one in problems if one is not None]
    if wrong:
        raise UsageError("recipe: " + "; ".join(wrong))


@cache
def _field_words() -> dict[str, tuple[Any, ...]]:
    """The words that fields of `trl.SFTConfig` list as their choices; the trainer does not check them all."""
    from trl.trainer.sft_config import SFTConfig

    listed = {one.name: one.metadata.get("choices") for one in dataclasses.fields(SFTConfig)}
    return {name: tuple(words) for name, words in listed.items() if words}


@library_errors(REFUSED_BY_TRAINER)
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
    values["router_aux_loss_coef"] = 0.0  # that of the base's own routers, which are frozen
    if has_validation:
        values["eval_strategy"] = "epoch"
    values |= {key: value for key, value in recipe.trainer.items() if key not in REFUSED}
    values.pop("model_init_kwargs", None)  # the model is loaded before the trainer is made
    if values.get("load_best_model_at_end") and "save_steps" not in recipe.trainer:
        values["save_steps"] = values.get("eval_steps") or values["logging_steps"]
    values["save_total_limit"] = None  # checkpoints.prune deletes old ones, once the new one is complete
    values["logging_nan_inf_filter"] = False
    packing = bool(values.get("packing"))
    try:
        settings = SFTConfig(
            output_dir=recipe.output_dir,
            seed=recipe.seed,
            max_length=recipe.max_length,
            dataset_kwargs={
                "skip_prepare_dataset": not packing
            },  # the rows are tokens already; packing is still due
            **values,
        )
    except ValueError as error:
        if not values["bf16"] or "bf16" not in str(error):
            raise
        raise UsageError(  # it knows of more devices than CUDA's
            "bf16 is true and no device here takes it: leave it out, or add use_cpu (--use_cpu true) to train in "
            "bfloat16 on the CPU"
        ) from error
    _check_possible(settings, has_validation=has_validation)
    return settings


def _check_possible(settings: "SFTConfig", *, has_validation: bool) -> None:
    """Refuse what needs held-out rows, packing or a GPU where there is none; the trainer notices late, or never.

    Raises:
        UsageError: If a setting does.
    """
    import torch

    started = os.environ.get("WORLD_SIZE", "1")
    if started != str(settings.world_size):
        raise UsageError(
            f"a launcher has started {started} processes, and the trainer sees {settings.world_size}, so each would train by itself: "
            "on a CPU add use_cpu (--use_cpu true)"
        )
    if (settings.eval_strategy != "no" or settings.eval_on_start) and not has_validation:
        raise UsageError(
            "eval_strategy or eval_on_start asks for held-out rows: give them (--validation 0.1, or a source), or leave it out"
        )
    by_steps = settings.save_strategy == "steps" and settings.save_steps != settings.eval_steps
    if settings.load_best_model_at_end and by_steps:
        raise UsageError(
            f"load_best_model_at_end is true, eval_steps is {settings.eval_steps:g} and save_steps {settings.save_steps:g}: the best model may "
            "lie between two checkpoints; give both the same, or save_strategy best"
        )
    if settings.packing and settings.pad_to_multiple_of:
        raise UsageError(
            "packing and pad_to_multiple_of are given: routers cannot tell the padding of packed rows from tokens: leave "
            "pad_to_multiple_of out"
        )
    for name in ("shuffle_dataset", "eval_packing", "padding_free"):
        if getattr(settings, name) and not settings.packing:
            raise UsageError(
                f"{name} is true and has an effect with packing alone: add packing, or leave it out"
            )
    for name, instead in (("fp16", "bf16"), ("activation_offloading", "gradient_checkpointing")):
        if getattr(settings, name) and (settings.use_cpu or not torch.accelerator.is_available()):
            raise UsageError(f"{name} is true and needs a GPU: leave it out, or give {instead}")


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


def _problem(
    name: str, value: object, hint: Any, words: Sequence[Any] | None, *, any_number: bool
) -> str | None:
    if not _fits(value, hint):
        return f"{name} is {value!r}: give {_said(hint)}"
    if isinstance(value, str) and dict in _kinds(hint) and not (name in _FILES and Path(value).is_file()):
        return f"{name} is {value!r}: give a mapping{' or the path of a file' if name in _FILES else ''}"
    given = value if isinstance(value, list) else [value]
    if words is not None and any(isinstance(one, str | bool) and one not in words for one in given):
        return f"{name} is {value!r}: give {' or '.join(map(str, words))}"
    if name in _RANGES and not any_number and isinstance(value, int | float):
        is_allowed, allowed = _RANGES[name]
        if not is_allowed(value):
            return f"{name} is {value}: give {allowed}"
    return None


def _kinds(hint: Any) -> list[Any]:
    return [typing.get_origin(one) or one for one in _choices(hint)]


def _fits(value: object, hint: Any) -> bool:
    choices = _kinds(hint)
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
    return " or ".join(words[one] for one in _kinds(hint) if one in words)


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
