"""What is wrong with the values of a study, which a file may give of any type; a sentence for each problem."""

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from moa_peft.data.templates import Template
from moa_peft.errors import unknown
from moa_peft.evaluation.options import Mode
from moa_peft.training.recipe import (
    FACTORS,
    MOST,
    REFUSED,
    TRAINER_DEFAULTS,
    factor_problems,
    own_fields,
    whole_number_problems,
)

ChooseBy = Literal["answer_loss", "accuracy"]

EQUAL = (
    "num_train_epochs", "max_steps", "train_sampling_strategy", "length_column_name", "data_seed",
    "shuffle_dataset", "packing", "packing_strategy", "dataloader_drop_last", "dataloader_in_order",
    "ignore_data_skip", "accelerator_config", "model_init_kwargs", "trust_remote_code",
)  # fmt: skip
"""Fields of the trainer that no method may have for itself: they decide which rows it meets, in which order, in how many
steps, and on which base model. The batch is compared as a product."""

SAME_ORDER = ("random", "sequential")
"""Orders of the rows that follow from the seed alone; others draw on what the method's own weights have left."""

_LIMITS = (
    "train_limit", "tuning_limit", "validation_limit", "test_limit", "forgetting_limit", "most_rates",
)  # fmt: skip
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def problems_of(study: Any, *, reserved: str) -> list[str]:
    """Say what is wrong with a `StudyConfig`; ``reserved`` is the label that no method may have."""
    problems = _form_problems(study)  # what follows looks into these values
    if not problems:
        problems = [*_number_problems(study), *_method_problems(study, reserved)]
        problems += [*_comparison_problems(study), *_trainer_problems(study)]
    for name, given, known in (
        ("template", study.template, get_args(Template)),
        ("choose_by", study.choose_by, get_args(ChooseBy)),
        ("mode", "likelihood" if study.mode is None else study.mode, get_args(Mode)),
    ):
        if given not in known:
            problems.append(unknown(name, str(given), known))
    return problems


def _form_problems(study: Any) -> list[str]:
    values: list[tuple[str, object, Callable[[Any], bool], str]] = []
    text, names = (_is_text, "give text"), (_are_names, "give names, as a list or with commas between")
    fields = (_are_fields, "give fields, each as NAME: VALUE")
    values += [(name, getattr(study, name), *text) for name in ("out", "data", "baseline", "model")]
    optional = {name: getattr(study, name) for name in ("validation", "data_root")}
    values += [(name, value, *text) for name, value in optional.items() if value is not None]
    values += [("tasks", study.tasks, *names)]
    values += [
        (name, given, *names)
        for name in ("forgetting", "finalists")
        if (given := getattr(study, name)) not in ((), [], "", None)
    ]
    values += [("trainer", study.trainer, *fields), ("data_md5", study.data_md5, *fields)]
    if _are_fields(study.data_md5):
        values += [(f"data_md5.{name}", md5, *text) for name, md5 in study.data_md5.items()]
    for one in study.methods:
        values += [("label", one.label, *text), ("method", one.method, *text)]
        values += [(f"{one.label}: {name}", getattr(one, name), *fields) for name in ("mixture", "trainer")]
    return [f"{name} is {value!r}: {wanted}" for name, value, fits, wanted in values if not fits(value)]


def _number_problems(study: Any) -> list[str]:
    least = dict.fromkeys(_LIMITS, 1) | {
        "draw_seed": 0,
        "max_length": 2,
        "batch_size": 1,
        "router_prompts": 0,
    }
    problems: list[str] = []
    for name, low in least.items():
        value = getattr(study, name)
        if value is not None or name not in _LIMITS:
            problems += whole_number_problems(name, value, low)
    rates = study.learning_rates
    lists: tuple[tuple[str, Any, Callable[[Any], bool], str, str], ...] = (
        ("seeds", study.seeds, _is_seed, f"whole numbers from 0, below {MOST + 1:,}", "seed"),
        ("tuning_seeds", study.tuning_seeds, _is_seed, f"whole numbers from 0, below {MOST + 1:,}", "seed"),
        ("learning_rates", rates, _is_rate, "numbers above 0", "rate"),
    )
    for name, values, fits, wanted, each in lists:
        if not is_list(values) or not all(map(fits, values)):
            problems.append(f"{name} is {values!r}: give a list of {wanted}")
        elif len(set(values)) < len(values):
            problems.append(f"{name} is {list(values)}: give each {each} once")
    if problems:
        return problems
    if study.most_rates is not None and study.most_rates < len(rates):
        problems.append(f"most_rates is {study.most_rates}: learning_rates has {len(rates)} already")
    if study.tuning_limit is not None and (study.train_limit or study.tuning_limit) < study.tuning_limit:
        problems.append(
            f"tuning_limit is {study.tuning_limit}: give at most train_limit, {study.train_limit}"
        )
    return problems


def _method_problems(study: Any, reserved: str) -> list[str]:
    problems: list[str] = []
    labels = study.labels()
    for label in dict.fromkeys(labels):
        if not _LABEL.fullmatch(label) or label == reserved:
            problems.append(
                f"label is {label!r}: give letters, digits, dots, dashes and underscores, and not {reserved!r}, which is the bare model"
            )
        if labels.count(label) > 1:
            problems.append(f"the label {label!r} stands twice: give each entry a label of its own")
    for one in study.methods:
        for name in FACTORS:
            problems += [f"{one.label}: {wrong}" for wrong in factor_problems(name, getattr(one, name))]
    return problems


def _comparison_problems(study: Any) -> list[str]:
    problems: list[str] = []
    labels = study.labels()
    if study.baseline not in labels:
        problems.append(unknown("baseline", study.baseline, labels))
    problems += [unknown("finalist", one, labels) for one in study.finalists or () if one not in labels]
    if study.finalists and study.baseline in labels and study.baseline not in study.finalists:
        problems.append(
            f"the baseline {study.baseline!r} is no finalist: nothing could be compared with it; add it to finalists, or give another"
        )
    for place, one in enumerate(study.methods):
        for other in study.methods[:place]:
            if dataclasses.replace(one, label=other.label) == other:
                problems.append(
                    f"{other.label!r} and {one.label!r} are the same method: their runs would be one; leave one out"
                )
    return problems


def _trainer_problems(study: Any) -> list[str]:
    elsewhere = "it is no field of the trainer; what it stands for is said by the study's own keys"
    refused = {
        **dict.fromkeys(own_fields(), elsewhere),
        **REFUSED,
        "auto_find_batch_size": "a method that needs more memory would get smaller batches; leave it out, and give "
        "per_device_train_batch_size what the largest can hold",
    }
    problems = [
        f"trainer.{key}: {refused[key]}"
        for one in (study, *study.methods)
        for key, value in one.trainer.items()
        if key in refused and (value or key != "auto_find_batch_size")
    ]
    order = study.trainer.get("train_sampling_strategy", "random")
    if order not in SAME_ORDER:
        problems.append(
            f"trainer.train_sampling_strategy is {order!r}: methods would meet the rows in different orders; give "
            f"{' or '.join(SAME_ORDER)}, or leave it out"
        )
    problems += [
        f"{'' if one is study else f'{one.label}: '}trainer.learning_rate: give learning_rates, the same for every method"
        for one in (study, *study.methods)
        if "learning_rate" in one.trainer
    ]
    for one in study.methods:
        problems += [
            f"{one.label}: trainer.{key} must be that of the other methods: give it once, in the study's trainer"
            for key in EQUAL
            if key in one.trainer
        ]
        own, others = _batch(study.trainer_of(one)), _batch({**TRAINER_DEFAULTS, **study.trainer})
        if own is not None and others is not None and own != others:
            problems.append(
                f"{one.label}: per_device_train_batch_size times gradient_accumulation_steps differs from the other "
                "methods'"
            )
    return problems


def _batch(trainer: Mapping[str, Any]) -> int | None:
    """The rows of a step; None where they are no numbers, which `check_trainer` says."""
    parts = [trainer[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    return math.prod(parts) if all(type(one) is int for one in parts) else None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def is_list(values: object) -> bool:
    """Whether a value is a list with something in it."""
    return isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0


def _are_names(value: object) -> bool:
    return _is_text(value) or (isinstance(value, Sequence) and bool(value) and all(map(_is_text, value)))


def _are_fields(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_seed(value: Any) -> bool:
    return not whole_number_problems("seed", value, 0)


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max
