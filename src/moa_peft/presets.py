"""Methods of the family by name: each a point in the space of experts and routers, none a class of its own."""

from collections.abc import Callable
from dataclasses import dataclass

from moa_peft.config import ExpertConfig, RouterConfig, ThresholdConfig
from moa_peft.errors import UsageError, unknown
from moa_peft.experts import LoraExpert, ParallelAdapterExpert, PromptExpert


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One method: what it mixes and how."""

    summary: str
    """What it does, in a line."""
    source: str
    """Where it comes from."""
    experts: Callable[[], tuple[ExpertConfig, ...]]
    router: Callable[[], RouterConfig]


def paper_experts() -> tuple[ExpertConfig, ...]:
    """The paper's set in its order: LoRA on q, k, v; prompt; LoRA on o, down; parallel adapter."""
    return (
        LoraExpert(targets=("q_proj", "k_proj", "v_proj")),
        PromptExpert(),
        LoraExpert(targets=("o_proj", "down_proj")),
        ParallelAdapterExpert(),
    )


def promptless_experts() -> tuple[ExpertConfig, ...]:
    """The paper's set for Sparse MoA: without the prompt."""
    return (
        LoraExpert(targets=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")),
        ParallelAdapterExpert(),
    )


PAPER = "MoA, arXiv 2506.05928"
PRESETS: dict[str, Preset] = {
    "soft-moa": Preset(
        summary="all experts, each weighed by its own sigmoid gate for each token",
        source=f"{PAPER}, Soft MoA",
        experts=paper_experts,
        router=RouterConfig,
    ),
    "sparse-moa": Preset(
        summary="only the experts whose gate reaches a learned threshold of the token",
        source=f"{PAPER}, Sparse MoA; the threshold's gradient after arXiv 2407.14435",
        experts=promptless_experts,
        router=lambda: RouterConfig(threshold=ThresholdConfig(maximum=0.5)),
    ),
}


def preset_names() -> list[str]:
    """Every method's name."""
    return list(PRESETS)


def find_preset(name: str) -> Preset:
    """Find a method by name.

    Raises:
        UsageError: If there is none of that name, with the nearest one.
    """
    if name not in PRESETS:
        raise UsageError(unknown("method", name, PRESETS))
    return PRESETS[name]
