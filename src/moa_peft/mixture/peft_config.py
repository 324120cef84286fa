"""`MoAConfig`: what PEFT is given, saves and loads. Thin on purpose: the parts are frozen values of their own."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from peft import PeftConfig, PeftType, TaskType

from moa_peft.errors import UsageError, unknown
from moa_peft.mixture.config import (
    ArchitectureConfig,
    Config,
    ExpertConfig,
    RouterConfig,
    ThresholdConfig,
    from_mapping,
    reject,
)
from moa_peft.mixture.experts import expert_from_mapping
from moa_peft.mixture.presets import find_preset
from moa_peft.mixture.registration import PEFT_TYPE_NAME, add_peft_type

add_peft_type()

HEADS: Mapping[str, tuple[str, ...]] = {
    "CAUSAL_LM": (),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "FEATURE_EXTRACTION": (),
}
"""What models of a task call their new head, by task; PEFT's wrappers add all of these to ``modules_to_save``."""

BLOCKS_MARK = "(?#moa)"
"""Starts the pattern of blocks that `MoAModel` writes into ``target_modules`` for PEFT's own matching."""


@dataclass
class MoAConfig(PeftConfig):
    """A mixture of adapters as a PEFT method.

    Give ``experts`` (and a ``router``, or take the default), or start from a method of the family with `preset`.
    ``target_modules`` is not for the user: experts name their targets. Experts, router and architecture may be given as a file
    has them, as mappings; they become configs, which check themselves.

    Raises:
        UsageError: If a field is unknown or wrong; the message lists every problem.
    """

    experts: Sequence[ExpertConfig] = ()
    """The experts of each decoder block, in the order of their gates; a mapping with a "kind" becomes a config."""

    router: RouterConfig | None = field(default_factory=RouterConfig)
    """The router of each block; None gives every expert the gate 1."""

    layers_to_transform: list[int] | int | None = None
    """Decoder blocks to work on, counted from 0; None is all of them."""

    exclude_modules: list[str] | str | None = None
    """Modules that get no expert: names or endings of names, or a regular expression of whole names."""

    modules_to_save: list[str] | None = None
    """Modules of the base model that are trained and saved whole beside the mixture."""

    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    """Where the parts of a block are, for a family that is not known."""

    target_modules: str | None = None
    """Not for the user: `MoAModel` writes the blocks here for PEFT's own matching; never saved."""

    target_parameters: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = getattr(PeftType, PEFT_TYPE_NAME)
        self.task_type = self.task_type or TaskType.CAUSAL_LM
        if self.target_modules is not None and not str(self.target_modules).startswith(BLOCKS_MARK):
            raise UsageError(
                f"target_modules is {self.target_modules!r}: a mixture's targets belong to its experts, as in "
                "experts=[LoraExpert(targets=['q_proj', 'v_proj'])]"
            )
        self.target_modules = None
        if not isinstance(self.experts, list | tuple):
            raise UsageError(f"experts is {self.experts!r}: give a list of LoraExpert(...) and the like")
        self.experts = [_expert(one) for one in self.experts]
        self.router = None if self.router is None else _config(RouterConfig, self.router, "router field")
        self.architecture = _config(ArchitectureConfig, self.architecture or {}, "architecture field")
        reject("MoAConfig", self._problems())

    def _problems(self) -> list[str]:
        wrong: list[str] = []
        if not self.experts:
            wrong.append("experts is empty: give some, or start from MoAConfig.preset('soft-lora')")
        layers = self.layers_to_transform
        given = layers if isinstance(layers, list | tuple) else [] if layers is None else [layers]
        if any(type(one) is not int for one in given) or (layers is not None and not given):
            wrong.append(
                f"layers_to_transform is {layers!r}: give whole numbers, or leave it out for every block"
            )
        saved = self.modules_to_save
        if saved is not None and not (
            isinstance(saved, list | tuple) and all(isinstance(one, str) for one in saved)
        ):
            wrong.append(f"modules_to_save is {saved!r}: give a list of names")
        wrong += self._pattern_problems()
        if self.task_type not in HEADS:
            known = ", ".join(HEADS)
            wrong.append(f"task_type is {self.task_type}: a mixture is for decoders alone, so give {known}")
        return wrong

    def _pattern_problems(self) -> list[str]:
        excluded = self.exclude_modules
        if isinstance(excluded, str):
            try:
                re.compile(excluded)
            except re.error as error:
                return [f"exclude_modules is {excluded!r}: as a regular expression it has an error: {error}"]
        elif excluded is not None and not (
            isinstance(excluded, list | tuple | set) and all(isinstance(one, str) for one in excluded)
        ):
            return [f"exclude_modules is {excluded!r}: give a list of names, or a regular expression"]
        return []

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Make the config of a method of the family.

        Args:
            name: "soft-lora", "soft-moa", ...; `moa methods` lists them.
            **changes: Fields of this class. ``router`` may be a mapping that changes single fields of the preset's.

        Returns:
            The config.

        Raises:
            UsageError: If the name or a field is unknown, or a value is wrong.
        """
        chosen = find_preset(name)
        known = [one.name for one in dataclasses.fields(cls)]
        for key in changes:
            if key not in known:
                raise UsageError(unknown("field of MoAConfig", key, known))
        router = changes.pop("router", {})
        if isinstance(router, Mapping):
            router = _changed_router(name, chosen.router, router)
        return cls(**{"experts": list(chosen.experts), "router": router, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them; each expert with its kind."""
        return {
            **{one.name: getattr(self, one.name) for one in dataclasses.fields(self)},
            "experts": [expert.to_dict() for expert in self.experts],
            "router": None if self.router is None else dataclasses.asdict(self.router),
            "architecture": dataclasses.asdict(self.architecture),
            "target_modules": None,
        }


def _config(config_class: type[Config], value: Config | Mapping[str, Any], what: str) -> Config:
    if isinstance(value, Mapping):
        return from_mapping(config_class, value, what)
    if not isinstance(value, config_class):
        name = config_class.__name__
        raise UsageError(f"{what.split()[0]} is {value!r}: give {name}(...), or a mapping of its fields")
    return value


def _expert(one: ExpertConfig | Mapping[str, Any]) -> ExpertConfig:
    if isinstance(one, ExpertConfig):
        return one
    if isinstance(one, Mapping):
        return expert_from_mapping(one)
    raise UsageError(f"an expert is {one!r}: give LoraExpert(...) and the like, or a mapping with a kind")


def _changed_router(
    name: str, router: RouterConfig | None, changes: Mapping[str, Any]
) -> RouterConfig | None:
    if router is None:
        if changes:
            raise UsageError(
                f"router is {dict(changes)!r}: the method {name!r} has no router of its blocks; give a whole one, "
                "router=RouterConfig(...), to add it"
            )
        return None
    merged = {one.name: getattr(router, one.name) for one in dataclasses.fields(router)}
    for key, value in changes.items():
        current = merged.get(key)
        if isinstance(value, Mapping) and isinstance(current, ThresholdConfig):
            value = {**dataclasses.asdict(current), **value}
        merged[key] = value
    return from_mapping(RouterConfig, merged, "router field")
