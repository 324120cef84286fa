"""What a mixture is, as frozen values: thresholds, routers, sites of unknown families, the base of every expert.

Every class here checks itself at construction and reports all its problems at once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

from moa_peft.errors import UsageError, unknown

RouterKind = Literal["linear", "swiglu"]
RouterInput = Literal["projection", "block"]
Gate = Literal["sigmoid"]
ThresholdGradient = Literal["straight-through", "none"]

Config = TypeVar("Config")


def reject(config: str, wrong: Sequence[str]) -> None:
    """Raise one error that lists every problem of a config, or nothing when there is none.

    Raises:
        UsageError: If ``wrong`` is not empty.
    """
    if wrong:
        raise UsageError(f"{config}: {'; '.join(wrong)}")


def not_allowed(name: str, given: object, literal: object) -> list[str]:
    """Say that a field's value is not one of its ``Literal``'s; an empty list when it is."""
    allowed = get_args(literal)
    return [] if given in allowed else [f"{name} is {given!r}: give one of {', '.join(map(repr, allowed))}"]


def wrong_types(config: Any) -> list[str]:
    """Say which plain fields of a config hold another type than they are declared with; files bring anything.

    Args:
        config: An instance of one of this package's dataclasses.

    Returns:
        A sentence for each; whole numbers are welcome where fractions are.
    """
    wrong: list[str] = []
    for name, hint in get_type_hints(type(config)).items():
        value, allowed = getattr(config, name), get_args(hint) or (hint,)
        if value is None and type(None) in allowed:
            continue
        if int in allowed and type(value) is not int:
            wrong.append(f"{name} is {value!r}: give a whole number")
        elif float in allowed and type(value) not in (int, float):
            wrong.append(f"{name} is {value!r}: give a number")
        elif bool in allowed and type(value) is not bool:
            wrong.append(f"{name} is {value!r}: give true or false")
        elif (
            isinstance(value, tuple)
            and Sequence[int] in allowed
            and any(type(one) is not int for one in value)
        ):
            wrong.append(f"{name} is {value!r}: give whole numbers")
    return wrong


def from_mapping(config_class: type[Config], values: Mapping[str, Any], what: str) -> Config:
    """Build a config from a file's or a command line's mapping.

    Args:
        config_class: A dataclass of this package.
        values: Its fields by name.
        what: How to call a field in an error, as in "router field".

    Returns:
        The config.

    Raises:
        UsageError: If a key is not a field of the class (with the nearest one), or the class refuses the values.
    """
    known = [one.name for one in dataclasses.fields(config_class)]  # type: ignore[arg-type]  # Config is a dataclass
    for key in values:
        if key not in known:
            raise UsageError(unknown(what, key, known))
    return config_class(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class ThresholdConfig:
    """When Sparse MoA keeps an expert on: its score must reach the threshold. Give ``maximum`` or ``constant``."""

    maximum: float | None = None
    """Learned threshold: its upper bound Gamma_max, in (0, 1]; each token has its own. The paper's is 0.5."""

    constant: float | None = None
    """Fixed threshold, in [0, 1], the same for every token; nothing is learned."""

    gradient: ThresholdGradient = "straight-through"
    """How a learned threshold learns: a straight-through estimate, or "none" (the official code: it never moves)."""

    bandwidth: float = 0.1
    """Width of the straight-through estimate around the threshold, in units of the score; above 0."""

    at_least_one: bool = True
    """Keep the best expert of a token on even below the threshold; False as in the official code."""

    def __post_init__(self) -> None:
        reject("ThresholdConfig", wrong_types(self))
        wrong = not_allowed("gradient", self.gradient, ThresholdGradient)
        if (self.maximum is None) == (self.constant is None):
            wrong.append(
                f"maximum is {self.maximum} and constant is {self.constant}: give exactly one of them, "
                "maximum=0.5 for the paper's learned threshold"
            )
        if self.maximum is not None and not 0 < self.maximum <= 1:
            wrong.append(f"maximum is {self.maximum}: it must lie in (0, 1]")
        if self.constant is not None and not 0 <= self.constant <= 1:
            wrong.append(f"constant is {self.constant}: it must lie in [0, 1]")
        if self.constant is not None and (self.gradient != "straight-through" or self.bandwidth != 0.1):
            wrong.append("gradient and bandwidth belong to a learned threshold: leave them out with constant")
        if not self.bandwidth > 0:
            wrong.append(f"bandwidth is {self.bandwidth}: it must be above 0")
        reject("ThresholdConfig", wrong)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """How one decoder block turns a token into one weight for each of its experts."""

    kind: RouterKind = "swiglu"
    """One linear map, or the SwiGLU network of the paper's math setting (30 % of Soft MoA's parameters)."""

    hidden_per_expert: int | None = None
    """Hidden size of the SwiGLU router, times the number of experts; None is 4, the paper's. Not for "linear"."""

    gate: Gate = "sigmoid"
    """What makes weights of the router's logits: "sigmoid" weighs each expert for itself, in (0, 1)."""

    threshold: ThresholdConfig | None = None
    """Sparse MoA's threshold; None is Soft MoA, where every expert speaks."""

    router_input: RouterInput = "projection"
    """What the router reads: what q, k and v read (after the norm), or the "block"'s input (raw residual stream)."""

    def __post_init__(self) -> None:
        if isinstance(self.threshold, Mapping):
            threshold = from_mapping(ThresholdConfig, self.threshold, "threshold field")
            object.__setattr__(self, "threshold", threshold)
        if self.threshold is not None and not isinstance(self.threshold, ThresholdConfig):
            reject("RouterConfig", [f"threshold is {self.threshold!r}: give a mapping such as maximum: 0.5"])
        reject("RouterConfig", wrong_types(self))
        wrong = not_allowed("kind", self.kind, RouterKind)
        wrong += not_allowed("gate", self.gate, Gate)
        wrong += not_allowed("router_input", self.router_input, RouterInput)
        if self.kind == "linear" and self.hidden_per_expert is not None:
            wrong.append(
                f"hidden_per_expert is {self.hidden_per_expert}: a linear router has no hidden layer"
            )
        if self.hidden_per_expert is not None and self.hidden_per_expert < 1:
            wrong.append(f"hidden_per_expert is {self.hidden_per_expert}: it must be at least 1")
        reject("RouterConfig", wrong)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig:
    """Base of every kind of expert's config."""

    kind: ClassVar[str]
    """The name of the kind, as files spell it."""

    layers: Sequence[int] | None = None
    """Decoder blocks that carry this expert, counted from 0; None is all of them."""

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):  # files give lists, users ranges; a frozen value holds tuples
            value = getattr(self, one.name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, one.name, tuple(value))
        reject(type(self).__name__, wrong_types(self))
        wrong = self.problems()
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            wrong.append(f"layers is {self.layers}: give indices from 0, or None for all blocks")
        reject(type(self).__name__, wrong)

    def problems(self) -> list[str]:
        """What is wrong with the fields of this kind, a sentence each."""
        return []

    def site_names(self) -> tuple[str, ...]:
        """The sites of a block that get one expert of this kind each: projections, "mlp" or "attention"."""
        raise NotImplementedError

    def build(self, site: Any) -> Any:
        """Make the module that holds one expert's weights at ``site``, one of `site_names`."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The fields and the kind, as `adapter_config.json` holds them."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchitectureConfig:
    """Where things are in a decoder of a family that is not known. Paths are relative to a block."""

    blocks: str | None = None
    """Path of the list of decoder blocks from the model, as in "transformer.h"."""

    attention: str | None = None
    """Path of the attention module."""

    mlp: str | None = None
    """Path of the MLP module."""

    norm: str | None = None
    """Path of the norm before attention; its input is the block's input."""

    projections: Mapping[str, str] = field(default_factory=dict)
    """Paths of the linear layers that play q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj."""
