"""Methods of the family by name: each a point in the space of experts and routers, none a separate class."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from moa_peft.errors import UsageError, unknown
from moa_peft.mixture.config import ExpertConfig, RouterConfig, ThresholdConfig
from moa_peft.mixture.experts import LoraExpert, ParallelAdapterExpert, PromptExpert
from moa_peft.mixture.experts.base import PROJECTIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One method: what it mixes and how."""

    summary: str
    """What it does, in a line."""
    source: str
    """Where it comes from."""
    experts: tuple[ExpertConfig, ...]
    router: RouterConfig | None = None
    """The router of each block; None where every expert's gate is 1."""
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    """Factors of `moa_peft.parameter_groups` that `moa train` takes where the recipe has none."""


PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
"""The projections on which the paper puts LoRA."""

PAPER_EXPERTS = (
    LoraExpert(targets=("q_proj", "k_proj", "v_proj")),
    PromptExpert(),
    LoraExpert(targets=("o_proj", "down_proj")),
    ParallelAdapterExpert(),
)
"""The paper's set in its order."""

PROMPTLESS_EXPERTS = (LoraExpert(targets=PAPER_TARGETS), ParallelAdapterExpert())
"""The paper's set for Sparse MoA."""

_SOFTMAX = RouterConfig(kind="linear", gate="softmax", bias=False)
_BIASED_SOFTMAX = RouterConfig(kind="linear", gate="softmax")
_HYDRA_EXPERTS = (
    LoraExpert(targets=("q_proj", "k_proj", "v_proj"), num_experts=3, shared=True, router=_SOFTMAX),
    PromptExpert(num_experts=3, router=_BIASED_SOFTMAX),
    LoraExpert(targets=("o_proj", "down_proj"), num_experts=3, shared=True, router=_SOFTMAX),
    ParallelAdapterExpert(num_experts=3, shared=True, router=_BIASED_SOFTMAX),
)
"""The paper's set with three copies of each expert, which share what reads the input."""


def _copies_of_lora(router: RouterConfig, *, shared: bool = False) -> tuple[ExpertConfig, ...]:
    """Eight LoRA of rank 8 on each of the paper's projections, each projection with its own router."""
    return (LoraExpert(targets=PAPER_TARGETS, num_experts=8, shared=shared, router=router),)


PAPER = "MoA, arXiv 2506.05928"
PRESETS: dict[str, Preset] = {
    "soft-lora": Preset(
        summary="the default: LoRA on every linear layer, each weighted by its own sigmoid gate for each token",
        source="ours, from the study in docs/found.md",
        experts=(LoraExpert(targets=PROJECTIONS, alpha=64),),
        router=RouterConfig(kind="linear"),
        lr_factors={"router_lr_factor": 5.0},
    ),
    "soft-moa": Preset(
        summary="all experts, each weighted by its own sigmoid gate for each token",
        source=f"{PAPER}, Soft MoA",
        experts=PAPER_EXPERTS,
        router=RouterConfig(),
    ),
    "sparse-moa": Preset(
        summary="only the experts whose gate reaches a learned threshold of the token",
        source=f"{PAPER}, Sparse MoA; the threshold's gradient after arXiv 2407.14435",
        experts=PROMPTLESS_EXPERTS,
        router=RouterConfig(threshold=ThresholdConfig(maximum=0.5)),
    ),
    "soft-moa-hydra": Preset(
        summary="Soft MoA with three copies of each expert, weighted by a softmax at each site",
        source=f"the official code of {PAPER}",
        experts=_HYDRA_EXPERTS,
        router=RouterConfig(),
    ),
    "instance-moa": Preset(
        summary="Soft MoA's experts with one gate each for a whole instance, from its mean prompt token",
        source=f"{PAPER}, the comparison with instance-level routing",
        experts=PAPER_EXPERTS,
        router=RouterConfig(granularity="instance"),
    ),
    "unipeft": Preset(
        summary="Soft MoA's experts with one gate for each kind of them, for a whole instance",
        source="UniPELT, arXiv 2110.07577, as UniPEFT in the official code of MoA, arXiv 2506.05928",
        experts=PAPER_EXPERTS,
        router=RouterConfig(kind="linear", granularity="instance", gate_of="kind"),
    ),
    "molora": Preset(
        summary="eight LoRA on each projection, all of them, weighted by a softmax at each projection",
        source="MoLoRA, arXiv 2309.05444",
        experts=_copies_of_lora(_SOFTMAX),
    ),
    "hydralora": Preset(
        summary="MoLoRA with one A for the eight B of each projection",
        source="HydraLoRA, arXiv 2404.19245",
        experts=_copies_of_lora(_SOFTMAX, shared=True),
    ),
    "topk-moe-lora": Preset(
        summary="eight LoRA on each projection, the two best of each token, with a balance loss",
        source="Shazeer et al., arXiv 1701.06538, with the balance loss of arXiv 2101.03961",
        experts=_copies_of_lora(RouterConfig(kind="linear", gate="top-k", keep=2)),
    ),
    "adamole": Preset(
        summary="eight LoRA on each projection, those above a learned threshold of the token, with a balance loss",
        source="AdaMoLE, arXiv 2405.00361",
        experts=_copies_of_lora(RouterConfig(kind="linear", gate="threshold")),
    ),
    "lora": Preset(
        summary="plain LoRA, without a router: the baseline, equal to PEFT's own",
        source="LoRA, arXiv 2106.09685",
        experts=(LoraExpert(targets=PAPER_TARGETS, rank=16, alpha=16),),
    ),
    "parallel-adapter": Preset(
        summary="a bottleneck network beside the MLP, without a router",
        source="He et al., arXiv 2110.04366",
        experts=(ParallelAdapterExpert(),),
    ),
    "prompt-tuning": Preset(
        summary="zero-initialised attention to a learned prompt in every block, without a router",
        source="LLaMA-Adapter, arXiv 2303.16199",
        experts=(PromptExpert(),),
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
