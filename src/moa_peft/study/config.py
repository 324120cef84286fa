"""The config of a study: what is compared on what, in one frozen value."""

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from moa_peft.data.templates import Template
from moa_peft.errors import UsageError, expanded, unknown
from moa_peft.evaluation.options import Mode
from moa_peft.mixture.config import from_mapping
from moa_peft.training.recipe import (
    FACTORS,
    MOST,
    REFUSED,
    TRAINER_DEFAULTS,
    factor_problems,
    merge,
    own_fields,
    whole_number_problems,
)

FROZEN = "frozen"
"""Label of the base model without an adapter, which every study evaluates."""

EQUAL = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "train_sampling_strategy",
    "length_column_name",
    "data_seed",
    "shuffle_dataset",
    "packing",
    "packing_strategy",
    "dataloader_drop_last",
    "dataloader_in_order",
    "ignore_data_skip",
    "accelerator_config",
    "model_init_kwargs",
    "trust_remote_code",
)
"""Fields of the trainer that no method may have for itself: they decide which rows it meets, in which order, in how many
steps, and on which base model. The batch is compared as a product."""

ChooseBy = Literal["answer_loss", "accuracy"]

SAME_ORDER = ("random", "sequential")
"""Orders of the rows that follow from the seed alone; others draw on what the method's own weights have left."""

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One of the methods that are compared: a preset of the family with changes, as in a recipe."""

    method: str
    """The method of the family to start from; `moa methods` lists them."""

    label: str = ""
    """What tables and folders call it; the method's name unless given. Each label stands once."""

    mixture: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the method, as in a recipe: router.kind, experts.0.rank ..."""

    trainer: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `trl.SFTConfig` for this method alone; not its epochs, steps, learning rate, batch or order of rows."""

    router_lr_factor: float | None = None
    """Times the learning rate for routers, as in a recipe."""

    lora_b_lr_factor: float | None = None
    """Times the learning rate for the B of each LoRA, as in a recipe."""

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.method)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """What a study compares, and on what.

    Raises:
        UsageError: If a value is wrong; the message lists every problem.
    """

    out: str
    """Folder of the study: results.jsonl, the report, and a folder for each run."""

    data: str
    """Training rows: a folder under data_root, or what a recipe's data takes; its split "train". Several, with commas
    between, give one row each in turn."""

    methods: Sequence[Method]
    """The methods; each an entry with method, and where wanted label, mixture and trainer."""

    baseline: str
    """Label of the method that the others are compared with, question by question."""

    tasks: str | Sequence[str] = "commonsense"
    """The tests, as `moa evaluate --tasks` names them: a list, or names with commas between."""

    model: str = "smollm2"
    """Base model: a folder, a name on the hub, or "smollm2"."""

    validation: str | None = None
    """Rows to choose the learning rate on, given like data; its split "validation". None for those of data."""

    data_root: str = "../shared/data"
    """Folder with a folder of rows for each task."""

    data_md5: Mapping[str, str] = field(default_factory=dict)
    """MD5 of the unzipped file of rows for each task, and for "train" and "validation"; other files are refused."""

    seeds: Sequence[int] = (0, 125, 1225)
    """Seeds of the adapter's initial weights, the order of the rows and dropout; a run for each."""

    learning_rates: Sequence[float] = (7.5e-4,)
    """Learning rates, the same for every method; the best on the validation rows is chosen for each method."""

    most_rates: int | None = None
    """Learning rates that each method may try in all: while its choice lies at an end of those tried, twice or half of it
    is tried too. None tries those of the list alone."""

    tuning_seeds: Sequence[int] = (0,)
    """Seeds that the learning rates are tried with."""

    tuning_limit: int | None = None
    """Training rows while learning rates are tried, from the start of the file; None for those of train_limit."""

    finalists: Sequence[str] | None = None
    """Labels of the methods that are run with every seed and tested; None for all, [] to only try learning rates."""

    choose_by: ChooseBy = "answer_loss"
    """What chooses: the lowest "answer_loss" or the highest "accuracy" on the validation rows, mean over tuning_seeds."""

    train_limit: int | None = None
    """Use only so many training rows, from the start of the file; None for all."""

    validation_limit: int | None = None
    """Use only so many validation rows, drawn with draw_seed; None for all."""

    test_limit: int | None = None
    """Use only so many rows of each test, drawn with draw_seed, the same for every run; None for all."""

    draw_seed: int = 0
    """Seed of these draws. A smaller draw is part of a larger one."""

    mode: Mode | None = None
    """How tests are scored, as `moa evaluate --mode` has it; "likelihood" takes of tests without choices the loss alone."""

    forgetting: str | Sequence[str] = ()
    """Tasks that tell what training took away: the accuracy by the texts of their choices, less the frozen model's."""

    forgetting_limit: int | None = None
    """Use only so many questions of each of them, drawn with draw_seed; None for all."""

    template: Template = "paper"
    """How a row becomes text."""

    max_length: int = 512
    """Tokens kept of a training example."""

    batch_size: int = 16
    """Most questions in a forward pass of the evaluation; no result depends on it."""

    router_prompts: int = 32
    """Validation prompts that the figures of the router are taken on; 0 for none."""

    trainer: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `trl.SFTConfig` for every run: num_train_epochs, per_device_train_batch_size, save_steps ..."""

    def __post_init__(self) -> None:
        problems = _form_problems(self)  # what follows looks into these values
        if not problems:
            problems = [*_number_problems(self), *_method_problems(self), *_trainer_problems(self)]
        for name, given, known in (
            ("template", self.template, get_args(Template)),
            ("choose_by", self.choose_by, get_args(ChooseBy)),
            ("mode", "likelihood" if self.mode is None else self.mode, get_args(Mode)),
        ):
            if given not in known:
                problems.append(unknown(name, str(given), known))
        if problems:
            raise UsageError("study: " + "; ".join(problems))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """Build a study from the mapping of a file with its flags laid over it.

        Raises:
            UsageError: If a key is unknown, a required one is missing, or a value is wrong.
        """
        needed = [one.name for one in dataclasses.fields(cls) if one.default is dataclasses.MISSING]
        needed = [name for name in needed if name in ("out", "data", "methods", "baseline")]
        known = [one.name for one in dataclasses.fields(cls)]
        for key in settings:
            if key not in known:
                raise UsageError(unknown("study key", key, known))
        missing = [name for name in needed if not settings.get(name)]
        if missing:
            raise UsageError(
                f"the study has no {' and no '.join(missing)}: give --config FILE with it, or --{missing[0]} VALUE"
            )
        settings = _without_empty(settings, ("trainer", "data_md5"))
        entries = settings["methods"]
        wrong = wrong_entries(entries)
        if wrong:
            raise UsageError("study: " + "; ".join(wrong))
        methods = [
            from_mapping(
                Method,
                {"method": one}
                if isinstance(one, str)
                else _without_empty(one, ("label", "mixture", "trainer")),
                "field of a method",
            )
            for one in entries
        ]
        out = settings["out"]
        out = str(expanded(out)) if isinstance(out, str) else out
        return cls(**{**settings, "out": out, "methods": tuple(methods)})

    def task_names(self) -> str:
        """The tests with commas between."""
        return self.tasks if isinstance(self.tasks, str) else ",".join(self.tasks)

    def forgetting_names(self) -> str:
        """The tasks that tell what training took away, with commas between."""
        return self.forgetting if isinstance(self.forgetting, str) else ",".join(self.forgetting)

    @property
    def has_tuning(self) -> bool:
        """Whether learning rates are tried."""
        return len(self.learning_rates) > 1 or (self.most_rates or 1) > 1

    @property
    def short_rows(self) -> int | None:
        """The training rows of a tuning run where they are fewer than a final run's; None for as many."""
        return None if self.tuning_limit == self.train_limit else self.tuning_limit

    def labels(self) -> list[str]:
        """The methods' labels, in their order."""
        return [one.label for one in self.methods]

    def trainer_of(self, method: Method) -> dict[str, Any]:
        """The trainer's fields of a method's runs, all but the learning rate."""
        fields = {**TRAINER_DEFAULTS, **self.trainer, **method.trainer}
        return {key: value for key, value in fields.items() if key != "learning_rate"}


def studies_of(
    settings: Mapping[str, Any], flags: Mapping[str, Any], domain: str | None = None
) -> list[StudyConfig]:
    """The studies of a file: one, or one for each of its ``domains``, with changes and a folder of its own in ``out``.

    Args:
        settings: The file's.
        flags: What goes over them, over the changes of a domain too.
        domain: The only domain wanted; None for all.

    Raises:
        UsageError: If a value is wrong, or there is no such domain.
    """
    shared = {key: value for key, value in settings.items() if key != "domains"}
    domains = settings.get("domains")
    if domains is None and domain is None:
        return [StudyConfig.from_mapping(merge(shared, flags))]
    if not isinstance(domains, Mapping) or not all(isinstance(one, Mapping) for one in domains.values()):
        raise UsageError(f"domains is {domains!r}: give a mapping of names, each to the keys that it changes")
    if domain is not None and domain not in domains:
        raise UsageError(unknown("domain", domain, domains))
    found = []
    for name, changes in domains.items():
        if domain in (None, name):
            whole = merge(merge(shared, changes), flags)
            found.append(
                StudyConfig.from_mapping({**whole, "out": f"{whole.get('out', 'runs/study')}/{name}"})
            )
    return found


def _without_empty(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The settings without these keys where they are empty, as when all lines below them are commented out."""
    return {key: value for key, value in settings.items() if value is not None or key not in names}


def _form_problems(config: StudyConfig) -> list[str]:
    problems: list[str] = []
    for name in ("out", "data", "baseline", "model", "data_root"):
        problems += wrong_text(name, getattr(config, name))
    if config.validation is not None:
        problems += wrong_text("validation", config.validation)
    problems += wrong_names("tasks", config.tasks)
    problems += [] if config.forgetting in ((), [], "") else wrong_names("forgetting", config.forgetting)
    problems += wrong_fields("data_md5", config.data_md5) or [
        one for name, md5 in config.data_md5.items() for one in wrong_text(f"data_md5.{name}", md5)
    ]
    problems += wrong_fields("trainer", config.trainer)
    if config.finalists is not None and config.finalists != []:
        problems += wrong_names("finalists", config.finalists)
    for one in config.methods:
        problems += wrong_text("label", one.label) + wrong_text("method", one.method)
        problems += wrong_fields(f"{one.label}: mixture", one.mixture)
        problems += wrong_fields(f"{one.label}: trainer", one.trainer)
    return problems


def _number_problems(config: StudyConfig) -> list[str]:
    problems: list[str] = []
    limits = (
        "train_limit", "tuning_limit", "validation_limit", "test_limit", "forgetting_limit", "most_rates"
    )  # fmt: skip
    least = {
        **dict.fromkeys(limits, 1),
        "draw_seed": 0,
        "max_length": 2,
        "batch_size": 1,
        "router_prompts": 0,
    }
    for name, low in least.items():
        value = getattr(config, name)
        if value is None and name in limits:
            continue
        problems += whole_number_problems(name, value, low)
    for name in ("seeds", "tuning_seeds"):
        values = getattr(config, name)
        if not _is_list(values) or any(whole_number_problems(name, one, 0) for one in values):
            problems.append(f"{name} is {values!r}: give a list of whole numbers from 0, below {MOST + 1:,}")
        elif len(set(values)) < len(values):
            problems.append(f"{name} is {list(values)}: give each seed once")
    if _is_below(config.train_limit, config.tuning_limit):
        problems.append(
            f"tuning_limit is {config.tuning_limit}: give at most train_limit, {config.train_limit}"
        )
    return problems + _rate_problems(config)


def _rate_problems(config: StudyConfig) -> list[str]:
    problems: list[str] = []
    rates = config.learning_rates
    if not _is_list(rates) or any(
        type(one) not in (int, float) or not 0 < one <= sys.float_info.max for one in rates
    ):
        problems.append(f"learning_rates is {rates!r}: give a list of numbers above 0")
    elif len(set(rates)) < len(rates):
        problems.append(f"learning_rates is {list(rates)}: give each rate once")
    elif type(config.most_rates) is int and config.most_rates < len(rates):
        problems.append(f"most_rates is {config.most_rates}: learning_rates has {len(rates)} already")
    return problems


def _method_problems(config: StudyConfig) -> list[str]:
    problems: list[str] = []
    labels = config.labels()
    for label in dict.fromkeys(labels):
        if not _LABEL.fullmatch(label) or label == FROZEN:
            problems.append(
                f"label is {label!r}: give letters, digits, dots and dashes, and not {FROZEN!r}, which is the bare model"
            )
        if labels.count(label) > 1:
            problems.append(f"the label {label!r} stands twice: give each entry a label of its own")
    if config.baseline not in labels:
        problems.append(unknown("baseline", str(config.baseline), labels))
    problems += [unknown("finalist", one, labels) for one in config.finalists or () if one not in labels]
    for one in config.methods:
        for name in FACTORS:
            problems += [f"{one.label}: {wrong}" for wrong in factor_problems(name, getattr(one, name))]
    return problems


def _trainer_problems(config: StudyConfig) -> list[str]:
    problems = [
        f"trainer.{key}: {REFUSED[key]}"
        for one in (config, *config.methods)
        for key in one.trainer
        if key in REFUSED
    ]
    own = own_fields()
    problems += [
        f"trainer.{key}: it is no field of the trainer; what it stands for is said by the study's own keys"
        for one in (config, *config.methods)
        for key in one.trainer
        if key in own
    ]
    problems += [
        "trainer.auto_find_batch_size: a method that needs more memory would get smaller batches; leave it out, and give "
        "per_device_train_batch_size what the largest can hold"
        for one in (config, *config.methods)
        if one.trainer.get("auto_find_batch_size")
    ]
    if config.trainer.get("train_sampling_strategy", "random") not in SAME_ORDER:
        problems.append(
            f"trainer.train_sampling_strategy is {config.trainer['train_sampling_strategy']!r}: methods would meet the "
            f"rows in different orders; give {' or '.join(SAME_ORDER)}, or leave it out"
        )
    if "learning_rate" in config.trainer:
        problems.append("trainer.learning_rate: give learning_rates, the same for every method")
    for one in config.methods:
        problems += [
            f"{one.label}: trainer.{key} differs from the other methods': give it once, in the study's trainer"
            for key in EQUAL
            if key in one.trainer
        ]
        own, others = _batch(config.trainer_of(one)), _batch({**TRAINER_DEFAULTS, **config.trainer})
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


def _is_below(most: object, given: object) -> bool:
    return isinstance(most, int) and isinstance(given, int) and most < given


def _is_list(values: object) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0


def wrong_text(name: str, value: object) -> list[str]:
    """The problem of a value that is not text, or is empty; none where it is fine."""
    return [] if isinstance(value, str) and value else [f"{name} is {value!r}: give text"]


def wrong_names(name: str, value: object) -> list[str]:
    """The problem of a value that is neither a list of names nor text with commas between them."""
    listed = [value] if isinstance(value, str) else value
    if isinstance(listed, Sequence) and listed and not any(wrong_text(name, one) for one in listed):
        return []
    return [f"{name} is {value!r}: give names, as a list or with commas between"]


def wrong_fields(name: str, value: object) -> list[str]:
    """The problems of a value that is no mapping, or has a key that is no name."""
    if not isinstance(value, Mapping):
        return [f"{name} is {value!r}: give fields, each as NAME: VALUE"]
    return [f"{name} has the key {key!r}: give a name" for key in value if not isinstance(key, str)]


def wrong_entries(methods: object) -> list[str]:
    """The problems of a value that is no list of methods, or has an entry that is neither a name nor a mapping."""
    form = "each with method: NAME"
    if not isinstance(methods, Sequence) or isinstance(methods, str):
        return [f"methods is {methods!r}: give a list of entries, {form}"]
    return [
        f"methods holds {one!r}: give entries, {form}"
        for one in methods
        if not isinstance(one, str | Mapping) or not one
    ]
