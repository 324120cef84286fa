"""What families of models call the parts of a decoder block; `moa_peft.mixture.architecture` looks for these names.

Most families use Llama's names. A family is added here if its names, or the order inside a fused layer, are others; one
that is in no table works when `ArchitectureConfig` names its parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

QKV = ("q_proj", "k_proj", "v_proj")
PRE_NORMS = (
    "input_layernorm",
    "ln_1",
    "operator_norm",
    "norm",
    "norm_1",
    "ln_attn",
    "self_attn_layer_norm",
    "temporal_pre_norm",
)
"""The norm before the mixer, whose input is the block's input."""
POST_NORM_FAMILIES = ("olmo2", "olmo3", "exaone4")
"""Without a norm before the mixer: it reads the block's input."""

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
"""The output projection of attention."""

MLP_LAYERS: Mapping[str, tuple[str, ...]] = {
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h"),
    "down_proj": ("down_proj", "w2", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "output_linear"),
}
FUSED_MLP_LAYERS = ("gate_up_proj", "input_linear")
"""Layers that hold the gate and then the up projection."""
SHARED_EXPERTS = ("shared_expert", "shared_experts", "shared_mlp")
"""The MLP inside a mixture of experts that every token goes through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fused:
    """Several projections in one linear layer."""

    order: tuple[str, ...]
    """In the order of its output."""

    groups: str | int = "layer"
    """How often the order repeats: once for the "layer", for each "head", for each "key_value_head", or this number of times."""


FUSED_ATTENTION: Mapping[str, tuple[str, Fused]] = {
    "phi3": ("qkv_proj", Fused(order=QKV)),
    "phi4_multimodal": ("qkv_proj", Fused(order=QKV)),
    "gpt2": ("c_attn", Fused(order=QKV)),
    "mpt": ("Wqkv", Fused(order=QKV)),
    "gpt_neox": ("query_key_value", Fused(order=QKV, groups="head")),
    "bloom": ("query_key_value", Fused(order=QKV, groups="head")),
    "persimmon": ("query_key_value", Fused(order=QKV, groups="head")),
    "falcon": ("query_key_value", Fused(order=QKV, groups="key_value_head")),
    "gpt_bigcode": ("c_attn", Fused(order=QKV, groups="key_value_head")),
    "codegen": ("qkv_proj", Fused(order=("q_proj", "v_proj", "k_proj"), groups=4)),
}
"""The fused layer of a family's attention, by model type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recurrence:
    """A mixer that is no softmax attention: which layers it is known by, and what experts may stand at."""

    name: str
    known_by: tuple[str, ...]
    inputs: tuple[str, ...]
    """Layers that read the block's tokens, in the order in which they run."""
    output: str | None
    """None where a kernel reads the layer's weight without calling it, so that an expert there would be passed over."""


RECURRENCES = (
    Recurrence(
        name="linear attention", known_by=("in_proj_qkvz",), inputs=("in_proj_qkvz",), output="out_proj"
    ),
    Recurrence(
        name="linear attention",
        known_by=("in_proj_qkv",),
        inputs=("in_proj_qkv", "in_proj_z"),
        output="out_proj",
    ),
    Recurrence(
        name="linear attention", known_by=("qkv_proj", "output_gate"), inputs=("qkv_proj",), output="out_proj"
    ),
    Recurrence(name="state space", known_by=("in_proj", "conv1d"), inputs=("in_proj",), output=None),
    Recurrence(name="convolution", known_by=("in_proj", "conv"), inputs=("in_proj",), output="out_proj"),
    Recurrence(
        name="recurrence",
        known_by=("linear_x", "linear_y"),
        inputs=("linear_y", "linear_x"),
        output="linear_out",
    ),
)
