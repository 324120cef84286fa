"""A recipe: everything that a training run depends on, in one frozen value that can be written down and read back."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Self

from moa_peft.data.templates import Template
from moa_peft.errors import UsageError

if TYPE_CHECKING:
    from moa_peft.mixture.peft_config import MoAConfig

TRAINER_DEFAULTS: Mapping[str, Any] = {
    "num_train_epochs": 2,  # the paper's; so are the six below
    "learning_rate": 7.5e-4,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.02,
    "adam_beta2": 0.95,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "warmup_steps": 0.1,  # below 1 a share of all steps; the paper's one epoch of two is long for other data
    "bf16": False,
    "gradient_checkpointing": False,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "logging_steps": 10,  # in a run that would have fewer than five logs a fifth of its steps
    "logging_first_step": True,
    "save_strategy": "steps",
    "save_steps": 200,  # in a run that would have fewer than twenty checkpoints a twentieth of its steps
    "save_total_limit": 2,
    "ddp_find_unused_parameters": False,
    "report_to": "none",
}
"""What moa sets differently from `trl.SFTConfig`, or wants said; a recipe's own value goes before it."""

TOKENISED_HERE = "the rows are tokenised by moa: use template and max_length"
_HUB = (
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"
)  # fmt: skip
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "dataset_kwargs",
            "dataset_text_field",
            "completion_only_loss",
            "assistant_only_loss",
            "truncation_mode",
        ),
        TOKENISED_HERE,
    ),
    **dict.fromkeys(
        ("eos_token", "pad_token", "chat_template_path"),
        "the model's own tokenizer is used as it is: leave it out",
    ),
    "resume_from_checkpoint": "use resume",
    "remove_unused_columns": "moa prepares the columns itself: leave it out",
    **dict.fromkeys(_HUB, "moa writes to a folder: upload it afterwards with `hf upload NAME FOLDER`"),
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict", "label_names", "include_for_metrics", "batch_eval_metrics"),
        "moa trains, and measures the loss of held-out rows: use validation",
    ),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"), "held-out rows are scored as in training: leave it out"
    ),
    **dict.fromkeys(("local_rank", "parallelism_config"), "use `accelerate launch`, which sets it"),
    "enable_jit_checkpoint": "its checkpoints count as cut off here: use save_steps",
    "logging_nan_inf_filter": "moa stops at a non-finite loss and must see it: leave it out",
}
"""Fields of `trl.SFTConfig` that have no meaning here, and what to do instead."""


DEFAULT_METHOD = "soft-lora"
"""The recommended one of the presets."""

FACTORS = ("router_lr_factor", "lora_b_lr_factor")
"""Keys of a recipe that are arguments of `parameter_groups`."""

_SHORT: Mapping[str, str] = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "steps": "max_steps",
    "out": "output_dir",
}
"""What other tools call keys of a recipe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that one training run depends on.

    Raises:
        UsageError: If a value is wrong; the message lists every problem.
    """

    data: str
    """Training rows: a .json, .jsonl or .json.gz file, a folder of them, a name on the hub, or "demo"; several, with
    commas between, for one row of each in turn."""

    output_dir: str
    """Folder for the adapter, its model card and the checkpoints; must be new or empty, unless resume is given."""

    model: str = "smollm2"
    """Base model: a folder, a name on the hub, or "smollm2", the embedded default (SmolLM2-135M-Instruct)."""

    data_split: str | None = None
    """Which split of the data to train on; none is the source's training split."""

    data_md5: str | None = None
    """MD5 of the training rows; other rows are then an error. Training fills it in when it writes the recipe down."""

    method: str = DEFAULT_METHOD
    """The method of the family to start from; `moa methods` lists them."""

    mixture: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the method: router.kind, router.threshold.maximum, experts, experts.0.rank, layers_to_transform ..."""

    template: Template = "paper"
    """How a row becomes text: "paper" for its instruction template, "chat" for the tokenizer's chat template."""

    max_length: int = 512
    """Tokens kept of an example; one whose answer would be cut away whole is dropped."""

    limit: int | None = None
    """Use at most so many training rows."""

    validation: str | float | None = None
    """Held-out rows: a source like data, or a share of the training rows between 0 and 1."""

    validation_md5: str | None = None
    """MD5 of the rows of a validation source, as data_md5 is of the training rows; none for a share."""

    router_lr_factor: float | None = None
    """Times the learning rate for routers and thresholds. A number, 1 too, also ends weight decay on them, on biases,
    prompts and scales; none is the method's own: 5 for soft-lora, for the others the trainer's parameter groups."""

    lora_b_lr_factor: float | None = None
    """Times the learning rate for the B of each LoRA (LoRA+); none as for router_lr_factor."""

    seed: int = 0
    """Seed of the adapter's initial weights, the order of the rows, dropout and the held-out share."""

    resume: bool | str = False
    """Go on from the last complete checkpoint in output_dir, or from the checkpoint folder given."""

    trainer: Mapping[str, Any] = field(default_factory=dict)
    """Every other key: fields of `trl.SFTConfig`, written flat beside the keys above."""

    def __post_init__(self) -> None:
        problems = [*_text_problems(self), *_number_problems(self)]
        if self.template not in ("paper", "chat"):
            problems.append(f"template is {self.template!r}: give 'paper' or 'chat'")
        if not isinstance(self.mixture, Mapping):
            problems.append(f"mixture is {self.mixture!r}: give fields, as in --mixture.router.kind linear")
        if not isinstance(self.resume, bool | str) or self.resume == "":
            problems.append(f"resume is {self.resume!r}: give true, false or the path of a checkpoint")
        problems += [f"{key}: {REFUSED[key]}" for key in self.trainer if key in REFUSED]
        if problems:
            raise UsageError("recipe: " + "; ".join(problems))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], trainer_fields: Collection[str]) -> Self:
        """Build a recipe from the flat mapping of a file or a command line.

        Args:
            settings: Keys of the recipe and of the trainer in one flat mapping.
            trainer_fields: Names of the fields of `trl.SFTConfig`.

        Returns:
            The recipe.

        Raises:
            UsageError: If a key is unknown (with the nearest known one), a required one is missing, or a value is
                wrong.
        """
        check_keys(settings, trainer_fields)
        own = own_fields()
        missing = [name for name in ("data", "output_dir") if settings.get(name) is None]
        if missing:
            raise UsageError(f"the recipe has no {' and no '.join(missing)}: give --{missing[0]} VALUE")
        trainer = {key: value for key, value in settings.items() if key not in own}
        return cls(**{key: settings[key] for key in own if key in settings}, trainer=trainer)

    def to_mapping(self) -> dict[str, Any]:
        """Write the recipe as the flat mapping that `from_mapping` reads, the trainer's defaults included."""
        own = {name: getattr(self, name) for name in own_fields()}
        return {**own, **factors_of(self), **TRAINER_DEFAULTS, **self.trainer}


def own_fields() -> list[str]:
    """Names of the keys that are moa's own, in the order of the class."""
    return [one.name for one in dataclasses.fields(Recipe) if one.name != "trainer"]


def check_keys(given: Iterable[str], trainer_fields: Collection[str]) -> None:
    """Check that keys are those of a recipe or of its trainer.

    Raises:
        UsageError: If one is not, with the nearest known one.
    """
    own = own_fields()
    for key in given:
        if key not in own and key not in trainer_fields:
            near = [_SHORT[key]] if key in _SHORT else get_close_matches(key, [*own, *trainer_fields], n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(
                f"unknown recipe key {key!r}: {hint}known: {', '.join(own)}, and every field of trl.SFTConfig"
            )


def factor_problems(name: str, factor: object) -> list[str]:
    """Problems of a factor on a learning rate: it must be None or a number above 0."""
    if factor is None:
        return []
    if isinstance(factor, int | float) and not isinstance(factor, bool) and 0 < factor < math.inf:
        return []
    return [f"{name} is {factor!r}: give a number above 0, or leave it out"]


MOST = 2**32 - 1
"""The largest whole number of a recipe or a study: seeds beyond it are none of numpy's."""


def whole_number_problems(name: str, value: object, least: int) -> list[str]:
    """Problems of a value that must be a whole number from ``least`` to `MOST`."""
    if type(value) is int and least <= value <= MOST:
        return []
    most = f", below {MOST + 1:,}" if type(value) is int and value > MOST else ""
    return [f"{name} is {value!r}: give a whole number of at least {least}{most}"]


def _text_problems(recipe: Recipe) -> list[str]:
    values = {name: getattr(recipe, name) for name in ("data", "output_dir", "model", "method")}
    optional = {name: getattr(recipe, name) for name in ("data_split", "data_md5", "validation_md5")}
    values |= {name: value for name, value in optional.items() if value is not None}
    wrong = {name: value for name, value in values.items() if not isinstance(value, str) or not value}
    return [f"{name} is {value!r}: give text" for name, value in wrong.items()]


def _number_problems(recipe: Recipe) -> list[str]:
    problems: list[str] = []
    for name, least in (("max_length", 2), ("limit", 1), ("seed", 0)):
        value = getattr(recipe, name)
        if value is None and name == "limit":
            continue
        problems += whole_number_problems(name, value, least)
    for name in FACTORS:
        problems += factor_problems(name, getattr(recipe, name))
    share = recipe.validation
    is_share = isinstance(share, float) and 0 < share < 1
    if not is_share and share is not None and (not isinstance(share, str) or not share):
        problems.append(
            f"validation is {share!r}: give a data source, or a share of the rows between 0 and 1"
        )
    return problems


def merge(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Apply changes to settings: mappings are merged, everything else is replaced.

    A mapping with whole numbers as keys changes single entries of a list, as ``--mixture.experts.0.rank 16`` does.

    Args:
        settings: The original, as from a file.
        changes: What overrides it, as from flags.

    Returns:
        A new mapping; neither argument is changed.

    Raises:
        UsageError: If a list has no entry of the given number.
    """
    merged = dict(settings)
    same = {str(key): key for key in merged}  # 0 in a file is "0" in a flag
    for key, value in changes.items():
        known = same.get(str(key), key)
        merged[known] = _merged(key, merged.get(known), value)
    return merged


def _merged(name: str, old: Any, new: Any) -> Any:
    if not isinstance(new, Mapping):
        return new
    if isinstance(old, Mapping):
        return merge(old, new)
    if isinstance(old, list) and new and all(str(key).isdecimal() for key in new):
        entries = list(old)
        for key, value in new.items():
            if int(key) >= len(entries):
                raise UsageError(f"{name}.{key} does not exist: {name} has entries 0 to {len(entries) - 1}")
            entries[int(key)] = _merged(f"{name}.{key}", entries[int(key)], value)
        return entries
    return new


def factors_of(one: Any) -> dict[str, float]:
    """The factors on learning rates of a recipe, or of a method in a study: its own, else those of its preset."""
    from moa_peft.mixture.presets import find_preset

    own = {name: factor for name in FACTORS if (factor := getattr(one, name)) is not None}
    return {**find_preset(one.method).lr_factors, **own}


def build_peft_config(recipe: Recipe) -> "MoAConfig":
    """Make the config of the recipe's method with the recipe's changes; see `mixture_config`."""
    return mixture_config(recipe.method, recipe.mixture)


def mixture_config(method: str, mixture: Mapping[str, Any]) -> "MoAConfig":
    """Make the config of a method with changes.

    Args:
        method: A preset's name, as "soft-lora".
        mixture: Fields of `MoAConfig` that differ from it; ``{"experts": {0: {"rank": 4}}}`` changes one expert of its list.

    Returns:
        A config that `peft.get_peft_model` takes.

    Raises:
        UsageError: If the method or a field is unknown, or a value is wrong.
    """
    from moa_peft.mixture.peft_config import MoAConfig

    changes = dict(mixture)
    if isinstance(changes.get("experts"), Mapping):
        experts = MoAConfig.preset(method).to_dict()["experts"]
        changes["experts"] = merge({"experts": experts}, {"experts": changes["experts"]})["experts"]
    return MoAConfig.preset(method, **changes)
