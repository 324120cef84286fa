"""Tiny random models of every family, and the mixtures that the shared tests put on them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from moa_peft import LoraExpert, MoAConfig, ParallelAdapterExpert, PromptExpert, RouterConfig, ThresholdConfig
from moa_peft.mixture.experts import DoraExpert, IA3Expert, SequentialAdapterExpert, VeraExpert
from moa_peft.mixture.gate_cache import cache_of

VOCABULARY = 97
GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLAIN = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """One family: how to build it small, and where its parts are (stated here again, by hand, for the oracle)."""

    model_type: str
    settings: dict[str, object]
    targets: tuple[str, ...] = GATED
    block_norm: str | None = "input_layernorm"
    attention: str = "self_attn"
    paths: dict[str, str]
    fused: dict[str, tuple[str, ...]]
    per_head: bool = False
    attention_implementations: tuple[str, ...] = ("sdpa", "eager")


def llama_paths() -> dict[str, str]:
    attention = {name: f"self_attn.{name}" for name in GATED[:4]}
    return attention | {name: f"mlp.{name}" for name in GATED[4:]}


SIZES: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PLAIN_SIZES = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}


def llama_like(model_type: str, **settings: object) -> TinyFamily:
    norm = settings.pop("block_norm", "input_layernorm")
    implementations = settings.pop("attention_implementations", ("sdpa", "eager"))
    return TinyFamily(
        model_type=model_type,
        settings={**SIZES, **settings},
        paths=llama_paths(),
        fused={},
        block_norm=norm,
        attention_implementations=implementations,
    )


FAMILIES: dict[str, TinyFamily] = {
    "llama": llama_like("llama"),
    "mistral": llama_like("mistral", sliding_window=None),
    "qwen2": llama_like("qwen2"),
    "qwen3": llama_like("qwen3", head_dim=12),
    "gemma2": llama_like("gemma2", head_dim=12, query_pre_attn_scalar=20, attention_implementations=("eager",)),
    "gemma3": llama_like("gemma3_text", head_dim=12, query_pre_attn_scalar=20),
    "olmo2": llama_like("olmo2", block_norm=None),
    "phi3": TinyFamily(
        model_type="phi3",
        settings=SIZES,
        paths=dict.fromkeys(GATED[:3], "self_attn.qkv_proj")
        | {"o_proj": "self_attn.o_proj", "down_proj": "mlp.down_proj"}
        | dict.fromkeys(("gate_proj", "up_proj"), "mlp.gate_up_proj"),
        fused={"self_attn.qkv_proj": GATED[:3], "mlp.gate_up_proj": ("gate_proj", "up_proj")},
    ),
    "gpt_neox": TinyFamily(
        model_type="gpt_neox",
        settings=PLAIN_SIZES,
        targets=PLAIN,
        attention="attention",
        paths=dict.fromkeys(GATED[:3], "attention.query_key_value")
        | {"o_proj": "attention.dense", "up_proj": "mlp.dense_h_to_4h", "down_proj": "mlp.dense_4h_to_h"},
        fused={"attention.query_key_value": GATED[:3]},
        per_head=True,
    ),
    "gpt2": TinyFamily(
        model_type="gpt2",
        settings={
            "vocab_size": VOCABULARY, "n_embd": 32, "n_inner": 44, "n_layer": 2, "n_head": 4, "n_positions": 64,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        },
        targets=PLAIN,
        block_norm="ln_1",
        attention="attn",
        paths=dict.fromkeys(GATED[:3], "attn.c_attn")
        | {"o_proj": "attn.c_proj", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"},
        fused={"attn.c_attn": GATED[:3]},
    ),
}  # fmt: skip


def everything(family: TinyFamily) -> MoAConfig:
    """Every expert kind on every projection, different ranks, a learned threshold, the raw residual stream."""
    half = len(family.targets) // 2
    return MoAConfig(
        experts=[
            LoraExpert(targets=family.targets[:half], rank=3, alpha=5),
            PromptExpert(length=5),
            LoraExpert(targets=family.targets[half:], rank=2, alpha=4),
            ParallelAdapterExpert(size=7),
        ],
        router=RouterConfig(
            hidden_per_expert=2, threshold=ThresholdConfig(maximum=0.9), router_input="block"
        ),
    )


def exact_start(family: TinyFamily) -> MoAConfig:
    """Everything that leaves a fresh model bit-equal: the parallel adapter does not."""
    return MoAConfig(
        experts=[LoraExpert(targets=family.targets), PromptExpert()], router=RouterConfig(kind="linear")
    )


def preset(name: str, **changes: object) -> Callable[[TinyFamily], MoAConfig]:
    return lambda family: MoAConfig.preset(name, **changes)


def copies(family: TinyFamily) -> MoAConfig:
    """Several copies of every expert, shared and not, each site with another gate."""
    top = RouterConfig(kind="linear", gate="top-k", keep=2)
    sparsegen = RouterConfig(kind="swiglu", hidden_per_expert=2, gate="sparsegen", target=2)
    return MoAConfig(
        experts=[
            LoraExpert(targets=family.targets[:2], rank=3, num_experts=4, router=top),
            PromptExpert(length=3, num_experts=2, router=RouterConfig(gate="sigmoid")),
            LoraExpert(targets=family.targets[2:], rank=2, num_experts=3, shared=True, router=sparsegen),
            ParallelAdapterExpert(
                size=5, num_experts=3, router=RouterConfig(kind="linear", gate="threshold")
            ),
        ],
        router=RouterConfig(gate="sparsegen", router_input="block"),
    )


def instance_kinds(family: TinyFamily) -> MoAConfig:
    """One gate a kind, top-k of them, for a whole instance."""
    return MoAConfig(
        experts=[
            LoraExpert(targets=family.targets, rank=2),
            ParallelAdapterExpert(size=4),
            PromptExpert(length=3),
        ],
        router=RouterConfig(kind="linear", gate="top-k", keep=2, granularity="instance", gate_of="kind"),
    )


def extra_kinds(family: TinyFamily) -> MoAConfig:
    """The kinds beyond the paper's."""
    return MoAConfig(
        experts=[
            IA3Expert(targets=("k_proj", "v_proj", "down_proj")),
            VeraExpert(targets=family.targets, rank=5),
            SequentialAdapterExpert(targets=("o_proj", "mlp"), size=6),
            DoraExpert(targets=family.targets, rank=2, alpha=3),
        ],
        router=RouterConfig(kind="linear"),
    )


METHODS: dict[str, Callable[[TinyFamily], MoAConfig]] = {
    "soft-moa": preset("soft-moa"),
    "sparse-moa": preset("sparse-moa"),
    "everything": everything,
    "exact-start": exact_start,
    "soft-moa-hydra": preset("soft-moa-hydra"),
    "instance-moa": preset("instance-moa"),
    "unipeft": preset("unipeft"),
    "molora": preset("molora"),
    "hydralora": preset("hydralora"),
    "topk-moe-lora": preset("topk-moe-lora"),
    "adamole": preset("adamole"),
    "lora": preset("lora"),
    "parallel-adapter": preset("parallel-adapter"),
    "prompt-tuning": preset("prompt-tuning"),
    "copies": copies,
    "instance-kinds": instance_kinds,
    "extra-kinds": extra_kinds,
}
ON_EVERY_FAMILY = ("soft-moa", "sparse-moa", "everything", "exact-start", "instance-moa")
"""The paper's methods, and those that stand on a family's structure; the others differ in the routing alone."""

CASES = [
    (family, method)
    for family in FAMILIES
    for method in METHODS
    if method in ON_EVERY_FAMILY or family in ("llama", "qwen3")
]
"""Every family and method that the shared tests run."""


def base_model(
    family: str, dtype: torch.dtype = torch.float32, attention: str | None = None, **sizes: int
) -> PreTrainedModel:
    """A small random model whose weights are wide enough to make its tokens matter."""
    tiny = FAMILIES[family]
    config = AutoConfig.for_model(tiny.model_type, **{**tiny.settings, **sizes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention or tiny.attention_implementations[0]
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    for parameter in model.parameters():  # the parameters only: model.to would round rotary buffers too
        parameter.data = parameter.data.to(dtype)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None  # generation must not stop early
    return model.eval()


def tokens(rows: int = 3, length: int = 11, seed: int = 1) -> Tensor:
    """Random token ids [rows, length] without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def awaken(model: nn.Module, seed: int = 2) -> None:
    """Give every trainable weight a random value, so that every expert speaks and gates differ between tokens."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def cached(output: Any) -> dict[str, Any]:
    """The cache that a call has left, as the keyword argument of the next one: transformers 5.24 renamed it."""
    return dict([cache_of(output)])


def mixture_model(
    family: str,
    method: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    awake: bool = True,
) -> PeftModel:
    """A tiny model with a mixture; awake: with random weights in every expert."""
    model = get_peft_model(base_model(family, dtype, attention), METHODS[method](FAMILIES[family]))
    assert isinstance(model, PeftModel)
    if awake:
        awaken(model)
    return model.eval()


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors."""
    return (a.double() - b.double()).abs().max().item()
