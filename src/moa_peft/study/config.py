"""The config of a study: what is compared on what, in one frozen value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from moa_peft.data.templates import Template
from moa_peft.errors import UsageError, expanded, unknown
from moa_peft.evaluation.options import Mode
from moa_peft.mixture.config import from_mapping
from moa_peft.study.config_checks import ChooseBy, is_list, problems_of
from moa_peft.training.recipe import TRAINER_DEFAULTS, merge

FROZEN = "frozen"
"""Label of the base model without an adapter, which every study evaluates."""


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
    data_root: str | None = None
    """Folder with a folder of rows for each task; None for the hub, as for `moa evaluate`."""
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
        problems = problems_of(self, reserved=FROZEN)
        if problems:
            raise UsageError("study: " + "; ".join(problems))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """Build a study from the mapping of a file with its flags laid over it.

        Raises:
            UsageError: If a key is unknown, a required one is missing, or a value is wrong.
        """
        missing = [name for name in ("out", "data", "methods", "baseline") if not settings.get(name)]
        if missing:
            raise UsageError(
                f"the study has no {' and no '.join(missing)}: give --config FILE with it, or --{missing[0]} VALUE"
            )
        entries, form = settings["methods"], "each with method: NAME"
        if not is_list(entries):
            raise UsageError(f"study: methods is {entries!r}: give a list of entries, {form}")
        for one in entries:
            if not one or not isinstance(one, str | Mapping):
                raise UsageError(f"study: methods holds {one!r}: give entries, {form}")
        methods = tuple(
            from_mapping(
                Method,
                {"method": one}
                if isinstance(one, str)
                else _without_empty(one, ("label", "mixture", "trainer")),
                "field of a method",
            )
            for one in entries
        )
        given = _without_empty(settings, ("trainer", "data_md5"))
        if isinstance(given.get("finalists"), str):
            given["finalists"] = [one.strip() for one in given["finalists"].split(",") if one.strip()]
        folders = {
            name: str(expanded(given[name]))
            for name in ("out", "data_root")
            if isinstance(given.get(name), str)
        }
        return from_mapping(cls, {**given, **folders, "methods": methods}, "study key")

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

    def finalist_labels(self) -> list[str]:
        """Labels of the methods that are run with every seed and tested, in the methods' order."""
        return [one for one in self.labels() if self.finalists is None or one in self.finalists]

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
    if (
        not isinstance(domains, Mapping)
        or not domains
        or not all(isinstance(name, str) and isinstance(one, Mapping) for name, one in domains.items())
    ):
        given = "the study has no domains" if domains is None else f"domains is {domains!r}"
        raise UsageError(f"{given}: give a mapping of names, each to the keys that it changes")
    if domain is not None and domain not in domains:
        raise UsageError(unknown("domain", domain, domains))
    wholes = {
        name: merge(merge(shared, one), flags) for name, one in domains.items() if domain in (None, name)
    }
    return [
        StudyConfig.from_mapping({**whole, "out": f"{whole['out']}/{name}"} if whole.get("out") else whole)
        for name, whole in wholes.items()
    ]


def _without_empty(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The settings without these keys where they are empty, as when all lines below them are commented out."""
    return {key: value for key, value in settings.items() if value is not None or key not in names}
