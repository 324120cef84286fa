"""What a mixture is, as frozen values: thresholds, routers, sites of unknown families, the base of every expert.

Every class here checks itself at construction and reports all its problems at once.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

from moa_peft.errors import UsageError, unknown

RouterKind = Literal["linear", "swiglu"]
RouterInput = Literal["projection", "block"]
Granularity = Literal["token", "instance"]
Pooling = Literal["prompt", "official"]
GateOf = Literal["expert", "kind"]
FusedGroups = Literal["layer", "head", "key_value_head"]
ThresholdGradient = Literal["straight-through", "none"]

_MOST = 2**16
"""The largest size of anything in a mixture; no hidden size is larger."""

Config = TypeVar("Config")


class GateKind(Protocol):
    """What a config must know of a kind of gate; `moa_peft.mixture.gates.Gate` is one."""

    @classmethod
    def problems(cls, config: "RouterConfig") -> list[str]:
        """What is wrong with a router's options for this gate, a sentence each."""
        ...


GATES: dict[str, type[GateKind]] = {}
"""The known kinds of gate by name; `moa_peft.mixture.gates.register_gate` fills it."""


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
        lists = [one for one in (hint, *allowed) if get_origin(one) is Sequence]
        if value is None and type(None) in allowed:
            continue
        if get_origin(hint) is Mapping:
            wrong += _wrong_mapping(name, value, hint)
        elif lists:
            wrong += _wrong_list(name, value, lists)
        elif float in allowed:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                wrong.append(f"{name} is {value!r}: give a number")
        elif int in allowed:
            wrong += _wrong_whole_number(name, value)
        elif bool in allowed and type(value) is not bool:
            wrong.append(f"{name} is {value!r}: give true or false")
        elif str in allowed and type(value) is not str:
            wrong.append(f"{name} is {value!r}: give text")
    return wrong


def _wrong_whole_number(name: str, value: object) -> list[str]:
    if type(value) is not int:
        return [f"{name} is {value!r}: give a whole number"]
    if value > _MOST and name != "seed":
        return [f"{name} is {value!r}: give a whole number of at most {_MOST:,}"]
    return []


def _wrong_list(name: str, value: object, hints: Sequence[Any]) -> list[str]:
    if not isinstance(value, tuple):
        spelt = isinstance(value, str) and Sequence[str] in hints  # a kind has its own words for that
        return [] if spelt else [f"{name} is {value!r}: give a list"]
    for kinds, called in (((int,), "whole numbers"), ((str,), "names"), ((float, int), "numbers")):
        if Sequence[kinds[0]] in hints and any(type(one) not in kinds for one in value):
            return [f"{name} is {value!r}: give {called}"]
    return []


def _wrong_mapping(name: str, value: object, hint: object) -> list[str]:
    of = get_args(hint)[1]
    called = {str: " to names", Sequence[str]: " to lists of names"}.get(of, "")
    pairs = list(value.items()) if isinstance(value, Mapping) else [(None, None)]
    words = [key for key, _ in pairs]
    for _, given in pairs:
        if of is str:
            words.append(given)
        elif of == Sequence[str]:
            words += list(given) if isinstance(given, list | tuple) else [None]
    if all(type(one) is str for one in words):
        return []
    return [f"{name} is {value!r}: give a mapping of names{called}"]


def from_mapping(config_class: type[Config], values: Mapping[str, Any], what: str) -> Config:
    """Build a config from a file's or a command line's mapping.

    Args:
        config_class: A dataclass of this package.
        values: Its fields by name.
        what: How to call a field in an error, as in "router field".

    Returns:
        The config.

    Raises:
        UsageError: If a key is not a field of the class (with the nearest one), one without a default is missing, or the class
            refuses the values.
    """
    known = [one.name for one in dataclasses.fields(config_class)]  # type: ignore[arg-type]  # Config is a dataclass
    for key in values:
        if key not in known:
            raise UsageError(unknown(what, key, known))
    needed = [one.name for one in dataclasses.fields(config_class) if _is_needed(one)]  # type: ignore[arg-type]  # likewise
    missing = [name for name in needed if name not in values]
    if missing:
        raise UsageError(f"{what} missing: give {' and '.join(missing)}")
    return config_class(**values)


def _is_needed(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


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
    """How a token turns into one weight for each expert: those of a decoder block, or the copies at one site.

    A `MoAConfig` has one for the block; an expert with several copies has one of its own for them.
    """

    kind: RouterKind = "swiglu"
    """One linear map, or the SwiGLU network of the paper's math setting (30 % of Soft MoA's parameters)."""

    hidden_per_expert: int | None = None
    """Hidden size of the SwiGLU router, times the number of experts; None is 4, the paper's. Not for "linear"."""

    bias: bool = True
    """Whether the router's linear maps have biases; they start at zero, the last one where initial_gate says."""

    gate: str = "sigmoid"
    """What makes weights of the logits: sigmoid, softmax, top-k, threshold (AdaMoLE), sparsegen, or a registered one."""

    initial_gate: float | None = None
    """Gate "sigmoid": every gate of a fresh router on a zero input, in (0, 1), set by the bias; None is 0.5, the paper's."""

    threshold: ThresholdConfig | None = None
    """Gate "sigmoid": Sparse MoA's threshold; None is Soft MoA, with all experts active."""

    keep: int | None = None
    """Gate "top-k": experts kept for each token."""

    noise: bool = False
    """Gate "top-k": add noise of a learned width to the logits while training."""

    target: int | None = None
    """Gate "sparsegen": the most experts of a token that the sparsity control leaves alone; None is no control."""

    sparsity: float | None = None
    """Gate "sparsegen": coefficient of the sparsity control; None is 0.01 with a target."""

    balance: float | None = None
    """Coefficient of the load balancing loss; None is the gate's own (0.001 for top-k, threshold and sparsegen), 0 is none."""

    router_input: RouterInput = "projection"
    """What a block's router reads: what q, k and v read (after the norm), or the "block"'s input (raw residual stream)."""

    granularity: Granularity = "token"
    """Whether each token has gates of its own, or all tokens of an "instance" the same, from its mean prompt token."""

    pooling: Pooling = "prompt"
    """Granularity "instance": the mean over the prompt's real tokens, or the "official" one over everything, padding too."""

    gate_of: GateOf = "expert"
    """Whether each expert of a block has a gate of its own, or all of one "kind" share one (UniPEFT)."""

    dead_adapter_gate: bool = False
    """Gate of a kind: the parallel adapter takes the prompt's gate and its own stays unused, as in the official UniPEFT."""

    def __post_init__(self) -> None:
        if isinstance(self.threshold, Mapping):
            threshold = from_mapping(ThresholdConfig, self.threshold, "threshold field")
            object.__setattr__(self, "threshold", threshold)
        if self.threshold is not None and not isinstance(self.threshold, ThresholdConfig):
            reject("RouterConfig", [f"threshold is {self.threshold!r}: give a mapping such as maximum: 0.5"])
        reject("RouterConfig", wrong_types(self))
        wrong = not_allowed("kind", self.kind, RouterKind)
        wrong += not_allowed("router_input", self.router_input, RouterInput)
        wrong += not_allowed("granularity", self.granularity, Granularity)
        wrong += not_allowed("pooling", self.pooling, Pooling)
        wrong += not_allowed("gate_of", self.gate_of, GateOf)
        if self.kind == "linear" and self.hidden_per_expert is not None:
            wrong.append(
                f"hidden_per_expert is {self.hidden_per_expert}: a linear router has no hidden layer"
            )
        if self.hidden_per_expert is not None and self.hidden_per_expert < 1:
            wrong.append(f"hidden_per_expert is {self.hidden_per_expert}: it must be at least 1")
        if self.balance is not None and not 0 <= self.balance < float("inf"):
            wrong.append(f"balance is {self.balance}: it must be at least 0")
        if self.granularity == "token" and self.pooling != "prompt":
            wrong.append(
                f"pooling is {self.pooling!r}: a token's own gates pool nothing; give granularity 'instance'"
            )
        if self.dead_adapter_gate and self.gate_of != "kind":
            wrong.append("dead_adapter_gate is true: it needs gate_of 'kind'")
        if isinstance(self.gate, str) and self.gate in GATES:
            wrong += GATES[self.gate].problems(self)
        else:
            wrong.append(unknown("gate", str(self.gate), GATES))
        reject("RouterConfig", wrong)

    def site_problems(self, num_experts: int) -> list[str]:
        """Say what is wrong with this as the router of the copies at one site.

        Args:
            num_experts: The copies.

        Returns:
            A sentence for each problem.
        """
        block_only = ("router_input", "granularity", "gate_of")
        defaults = {one.name: one.default for one in dataclasses.fields(self)}
        wrong = [
            f"router.{name} is {getattr(self, name)!r}: it belongs to a block's router; the router of an expert's "
            "copies reads its own site, token by token"
            for name in block_only
            if getattr(self, name) != defaults[name]
        ]
        for name in ("keep", "target"):
            given = getattr(self, name)
            if given is not None and given > num_experts:
                wrong.append(f"router.{name} is {given}: there are {num_experts} copies")
        return wrong


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig:
    """Base of every kind of expert's config."""

    kind: ClassVar[str]
    """The name of the kind, as files spell it."""
    reads_frozen_weights: ClassVar[bool] = False
    """Whether it reads its site's frozen weights in every call, so that they must lie as transformers loaded them."""

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

    def copies(self) -> tuple[int, RouterConfig | None]:
        """How many copies of the expert stand at each of its sites, and the router that weights them, if any."""
        return 1, None

    def problems(self) -> list[str]:
        """What is wrong with the fields of this kind, a sentence each."""
        return []

    def site_names(self) -> tuple[str, ...]:
        """The sites of a block that get one expert each: projections, "mlp", "attention"; ``targets`` unless a kind says otherwise."""
        return tuple(getattr(self, "targets", ()))

    def build(self, site: Any) -> Any:
        """Make the module that holds one expert's weights at ``site``, one of `site_names`."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The fields and the kind, as `adapter_config.json` holds them."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class CopiedExpertConfig(ExpertConfig):
    """Base of the kinds that may stand at a site in several copies, weighted by a router of their own."""

    num_experts: int = 1
    """Copies at each site; more than one need a ``router``."""

    router: RouterConfig | None = None
    """Weighs the copies at each site by what the site reads; a block's gate, if there is one, multiplies it."""

    def __post_init__(self) -> None:
        if isinstance(self.router, Mapping):
            router = from_mapping(RouterConfig, self.router, "router field")
            object.__setattr__(self, "router", router)
        ExpertConfig.__post_init__(self)

    def copies(self) -> tuple[int, RouterConfig | None]:
        """The copies and their router."""
        return self.num_experts, self.router

    def copy_problems(self) -> list[str]:
        """What is wrong with the copies, a sentence each."""
        if self.num_experts < 1:
            return [f"num_experts is {self.num_experts}: it must be at least 1"]
        if self.router is None and self.num_experts > 1:
            how = "router=RouterConfig(kind='linear', gate='softmax', bias=False)"
            return [
                f"num_experts is {self.num_experts} and router is None: say how the copies are weighted: {how}"
            ]
        if self.router is None:
            return []
        if not isinstance(self.router, RouterConfig):
            return [f"router is {self.router!r}: give RouterConfig(...), or a mapping such as gate: softmax"]
        return self.router.site_problems(self.num_experts)


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

    fused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Layers that hold several projections, by path: which, in the order of the output, as in ["q_proj", "k_proj", "v_proj"]."""

    fused_groups: FusedGroups = "layer"
    """How often that order repeats: once for the "layer", for each "head", or for each "key_value_head"."""

    def __post_init__(self) -> None:
        wrong = [*wrong_types(self), *not_allowed("fused_groups", self.fused_groups, FusedGroups)]
        reject("ArchitectureConfig", wrong)
