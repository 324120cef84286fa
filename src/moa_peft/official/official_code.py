"""What the official code has: which methods, which names, which constants, and what it computes otherwise."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from moa_peft.mixture.config import CopiedExpertConfig, ExpertConfig, RouterConfig
from moa_peft.mixture.experts import LoraExpert, ParallelAdapterExpert, PromptExpert
from moa_peft.mixture.peft_config import MoAConfig
from moa_peft.official.names import KIND_GATES, Layout

FORK_CONSTANTS: Mapping[str, float] = {
    "lora_rank": 8, "lora_alpha": 8.0, "p_adapter_size": 16, "prompt_len": 10, "swi_x": 4, "max_threshold": 0.5,
}  # fmt: skip
"""What the transformers fork hard-codes, by the names of the native code's arguments."""

Arguments = Mapping[str, float | int | str]


def method_of(config: MoAConfig) -> str:
    """Name the method that a config stands for, as `moa methods` does; "mixture" where it is none of them."""
    router, experts = config.router, config.experts
    kinds = {one.kind for one in experts}
    if router is None:
        return _routerless_method(kinds, experts)
    if router.gate != "sigmoid" or not kinds <= {"lora", "prompt", "parallel_adapter"}:
        return "mixture"
    if router.gate_of == "kind":
        return "unipeft"
    if router.threshold is not None:
        return "sparse-moa"
    if router.granularity == "instance":
        return "instance-moa"
    return "soft-moa" if all(one.copies()[0] == 1 for one in experts) else "soft-moa-hydra"


def _routerless_method(kinds: Collection[str], experts: Sequence[ExpertConfig]) -> str:
    if kinds in ({"parallel_adapter"}, {"prompt"}):
        return "prompt-tuning" if "prompt" in kinds else "parallel-adapter"
    gates = {router.gate for one in experts if (router := one.copies()[1]) is not None}
    if kinds != {"lora"} or len(gates) > 1:
        return "mixture"
    if not gates:
        return "lora"
    shared = any(getattr(one, "shared", False) for one in experts)
    names = {"softmax": "hydralora" if shared else "molora", "top-k": "topk-moe-lora", "threshold": "adamole"}
    return names.get(gates.pop(), "mixture")


def named_experts(config: MoAConfig) -> list[tuple[str, ExpertConfig]]:
    """The experts of a config by the names they have in a mixture, as "lora_q_proj", in the order of their gates."""
    return [
        (own.kind if site in ("mlp", "attention") else f"{own.kind}_{site}", own)
        for own in config.experts
        for site in own.site_names()
    ]


def problems(config: MoAConfig, layout: Layout) -> Iterator[str]:
    """Say what the official code of a layout has no name for, a sentence each."""
    for own in config.experts:
        if type(own) not in (LoraExpert, PromptExpert, ParallelAdapterExpert):
            yield f"the expert kind {own.kind!r} is not in it (it has lora, prompt, parallel_adapter)"
        elif isinstance(own, CopiedExpertConfig):
            yield from _copy_problems(own)
    names = [name for name, _ in named_experts(config)]
    if twice := sorted({one for one in names if names.count(one) > 1}):
        yield f"it has one of each expert, {', '.join(twice)} is there twice"
    yield from _lora_problems([own for own in config.experts if isinstance(own, LoraExpert)])
    kinds = sorted({own.kind for own in config.experts})
    if config.router is not None:
        yield from _router_problems(config.router, kinds)
    elif len(kinds) > 1:
        yield f"experts of several kinds ({', '.join(kinds)}) need a router of the block in it"
    if config.modules_to_save:
        yield f"modules_to_save {config.modules_to_save} is not in it"
    if layout == "fork":
        yield from _fork_problems(config)


def _lora_problems(loras: Sequence[LoraExpert]) -> Iterator[str]:
    for field in ("alpha", "rank", "num_experts", "shared", "layers", "router"):
        if any(getattr(own, field) != getattr(loras[0], field) for own in loras):
            given = " and ".join(dict.fromkeys(str(getattr(own, field)) for own in loras))
            yield f"its LoRA have one {field} for all targets, these have {given}"
    if any(own.rslora for own in loras):
        yield "its LoRA are scaled by alpha / rank, rslora is true: give alpha / rank as large instead"


def _router_problems(router: RouterConfig, kinds: Sequence[str]) -> Iterator[str]:
    if router.gate != "sigmoid":
        yield f"the gate {router.gate!r} of a block's router is not in it (it has sigmoid)"
    if not router.bias:
        yield "its block routers have biases, this one has none"
    if router.gate_of == "kind":
        if set(kinds) != set(KIND_GATES.values()):
            yield f"its gates of kinds are {', '.join(KIND_GATES.values())}, this adapter has {', '.join(kinds)}"
        if router.kind != "linear" or router.granularity != "instance" or router.threshold:
            yield "its gates of kinds are linear ones of a whole instance, without a threshold"


def _copy_problems(own: CopiedExpertConfig) -> Iterator[str]:
    router, name, is_lora = own.router, own.kind, isinstance(own, LoraExpert)
    if router is None:
        return
    if own.num_experts == 1:
        yield f"a router over a single copy of {name} is not in it"
        return
    if (
        router.gate not in (("softmax", "top-k", "threshold") if is_lora else ("softmax",))
        or router.kind != "linear"
    ):
        yield f"a {router.kind} router with gate {router.gate!r} over copies of {name} is not in it"
        return
    has_bias = not (is_lora and router.gate == "softmax")
    if router.bias is not has_bias:
        there = "a bias" if has_bias else "no bias"
        yield f"the routers over copies of {name} with gate {router.gate!r} have {there} in it"
    shared = getattr(own, "shared", None)
    if isinstance(own, ParallelAdapterExpert) and not shared:
        yield "several copies of the parallel adapter that share nothing crash it"
    if is_lora and shared and router.gate != "softmax":
        yield f"LoRA copies that share A have the gate 'softmax' in it, these have {router.gate!r}"


def _fork_problems(config: MoAConfig) -> Iterator[str]:
    router = config.router
    if any(own.copies()[0] > 1 for own in config.experts):
        yield "the fork's experts have no copies"
    if router is not None and router.gate_of == "kind":
        yield "the fork has no gates of kinds"
    if router is not None and router.granularity == "instance":
        yield "the fork has no gates of a whole instance"
    if router is not None and router.threshold is not None and router.threshold.constant is not None:
        yield "the fork has no constant threshold"


def arguments(config: MoAConfig) -> dict[str, float | int | str]:
    """The official code's own arguments for an adapter, as far as they are not the model's."""
    found: dict[str, float | int | str] = {}
    for own in config.experts:
        if isinstance(own, LoraExpert):
            found |= {"lora_rank": own.rank, "lora_alpha": own.alpha}
            if own.num_experts > 1:
                found["expert_num"] = own.num_experts
            if own.router is not None and own.router.keep is not None:
                found["top_k"] = own.router.keep
        elif isinstance(own, PromptExpert):
            found["prompt_len"] = own.length
        elif isinstance(own, ParallelAdapterExpert):
            found["p_adapter_size"] = own.size
    router = config.router
    if router is not None and router.gate_of == "expert":
        found["swi_x"] = (router.hidden_per_expert or 4) if router.kind == "swiglu" else 0
    threshold = None if router is None else router.threshold
    if threshold is not None and threshold.maximum is not None:
        found["max_threshold"] = threshold.maximum
    elif threshold is not None and threshold.constant is not None:
        found["const_threshold"] = threshold.constant
    return found


def differences(config: MoAConfig) -> Iterator[str]:
    """Say where the official code with an adapter's weights computes something else than this package does."""
    router = config.router
    if router is None:
        return
    if router.threshold is not None and router.threshold.at_least_one:
        yield "a token whose scores all lie below the threshold has no expert there; here it keeps the best"
    if router.granularity == "instance" and router.pooling == "prompt":
        yield "gates of an instance are means over padding and answer as well there; here over the prompt"
    if router.gate_of == "kind" and not router.dead_adapter_gate:
        yield "the parallel adapter takes the prompt's gate there; here its own"


def fork_constants(settings: Arguments) -> list[str]:
    """Say which `arguments` differ from what the fork hard-codes, so that its source would have to be changed."""
    return [
        f"{name} is {settings[name]}, the fork hard-codes {value:g}: change it in its source"
        for name, value in FORK_CONSTANTS.items()
        if name in settings and settings[name] != value
    ]
