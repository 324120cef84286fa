"""Where a decoder block keeps its attention, its MLP and its projections: read from the model, not copied from it.

Most families name things as Llama does; the small table below holds those that differ. A family that is in neither
works when `ArchitectureConfig` names its sites.

Sizes: B rows, T tokens, H query heads, G key/value heads, D head size, L vectors, W width of a fused output's group.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moa_peft.errors import UsageError, unknown
from moa_peft.mixture.config import ArchitectureConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One projection inside a fused linear layer."""

    path: str
    """The fused layer's path in the block."""

    name: str
    """Which of ``order`` it is."""

    order: tuple[str, ...]
    """The projections of the fused layer, in the order of its output."""

    per_head: bool = False
    """Whether the order repeats for each head (GPT-NeoX) instead of once for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How one family of models names the parts of a decoder block; paths are relative to the block."""

    attention: str = "self_attn"
    mlp: str = "mlp"
    norm: str | None = "input_layernorm"
    projections: Mapping[str, str | Part] = field(
        default_factory=lambda: {
            "q_proj": "self_attn.q_proj",
            "k_proj": "self_attn.k_proj",
            "v_proj": "self_attn.v_proj",
            "o_proj": "self_attn.o_proj",
            "gate_proj": "mlp.gate_proj",
            "up_proj": "mlp.up_proj",
            "down_proj": "mlp.down_proj",
        }
    )


def _fused(path: str, order: tuple[str, ...], *, per_head: bool = False) -> dict[str, Part]:
    return {name: Part(path=path, name=name, order=order, per_head=per_head) for name in order}


_QKV = ("q_proj", "k_proj", "v_proj")
LLAMA_LIKE = Family()
FAMILIES: dict[str, Family] = {
    "olmo2": Family(norm=None),
    "olmo3": Family(norm=None),
    "phi3": Family(
        projections={
            **_fused("self_attn.qkv_proj", _QKV),
            "o_proj": "self_attn.o_proj",
            **_fused("mlp.gate_up_proj", ("gate_proj", "up_proj")),
            "down_proj": "mlp.down_proj",
        }
    ),
    "gpt_neox": Family(
        attention="attention",
        projections={
            **_fused("attention.query_key_value", _QKV, per_head=True),
            "o_proj": "attention.dense",
            "up_proj": "mlp.dense_h_to_4h",
            "down_proj": "mlp.dense_4h_to_h",
        },
    ),
    "gpt2": Family(
        attention="attn",
        norm="ln_1",
        projections={
            **_fused("attn.c_attn", _QKV),
            "o_proj": "attn.c_proj",
            "up_proj": "mlp.c_fc",
            "down_proj": "mlp.c_proj",
        },
    ),
}


GATED_MLPS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "olmo3")
"""Families whose MLP is ``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` and nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """The columns of a fused layer's output that belong to one projection, the same in each of ``groups``."""

    groups: int
    width: int
    """Columns of a group, W."""
    start: int
    size: int

    def take(self, output: Tensor) -> Tensor:
        """Cut the projection's columns [..., groups * size] out of a fused output [..., groups * W]."""
        grouped = output.unflatten(-1, (self.groups, self.width))
        return grouped[..., self.start : self.start + self.size].flatten(-2)

    def place(self, change: Tensor) -> Tensor:
        """Put a change [..., groups * size] where it belongs in zeros of the fused output's shape."""
        grouped = change.unflatten(-1, (self.groups, self.size))
        return F.pad(grouped, (self.start, self.width - self.start - self.size)).flatten(-2)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSite:
    """A linear projection or a whole MLP: something an expert reads the input of and adds to the output of."""

    name: str
    module: nn.Module
    path: str
    """From the model, as `named_modules` has it."""
    in_features: int
    out_features: int
    slot: Slot | None = None
    """Set where the projection is part of a fused layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSite:
    """A block's attention: what a prompt needs to know of it."""

    name: str
    module: nn.Module
    path: str
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    key: LinearSite
    value: LinearSite

    def project(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Map vectors [L, hidden] to keys and values [L, G, D] with the frozen projections and the model's k-norm.

        The layers' own ``forward`` is called, past every hook, so that no adapter adds to them.
        """
        keys, values = _frozen(self.key, vectors), _frozen(self.value, vectors)
        keys = keys if self.key.slot is None else self.key.slot.take(keys)
        values = values if self.value.slot is None else self.value.slot.take(values)
        heads = (self.num_key_value_heads, self.head_size)
        norm = getattr(self.module, "k_norm", None)
        if norm is not None and norm.weight.numel() != self.head_size:  # OLMo 2: all heads at once
            return norm(keys).unflatten(-1, heads), values.unflatten(-1, heads)
        keys = keys.unflatten(-1, heads)
        return keys if norm is None else norm(keys), values.unflatten(-1, heads)


def _frozen(site: LinearSite, vectors: Tensor) -> Tensor:
    return site.module.forward(vectors)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One decoder block's parts."""

    index: int
    path: str
    module: nn.Module
    family: str
    hidden_size: int
    attention: nn.Module | None
    projection_input: nn.Module
    """The layer whose input is what q, k and v see."""
    projection_input_path: str
    block_input: nn.Module | None
    """The module whose input is the block's input, read inside a checkpointed forward; None where none is known."""
    block_input_path: str
    mlp_output_path: str | None
    """The layer whose output the MLP returns as it is; None where that is not known."""
    mlp_factors: tuple[nn.Module, ...]
    """The two modules whose outputs' product is what down_proj reads; none where that is not known."""
    sites: Mapping[str, LinearSite | AttentionSite]
    refusals: Mapping[str, str]
    """Why a site cannot be had, by the site's name."""

    def site(self, name: str, kind: str) -> LinearSite | AttentionSite:
        """Find a site by name.

        Raises:
            UsageError: If the family has no such site, or an expert of this ``kind`` cannot work there.
        """
        if name in self.refusals:
            raise UsageError(f"expert {kind!r} cannot work on {self.family}: {self.refusals[name]}")
        if name not in self.sites:
            raise UsageError(
                f"expert {kind!r}: {unknown(f'target of {self.family}', name, self.sites)}; for a family that names "
                "its layers otherwise give MoAConfig(architecture=ArchitectureConfig(projections={...}))"
            )
        return self.sites[name]


def find_blocks(model: nn.Module, named: ArchitectureConfig | None = None) -> list[Block]:
    """Find the decoder blocks of a causal language model and their parts.

    Args:
        model: The base model, with a transformers config.
        named: Paths that are given rather than found; they go before the table's.

    Returns:
        One `Block` each, in order.

    Raises:
        UsageError: If there are no such blocks, with what to name in the config.
    """
    named = named or ArchitectureConfig()
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UsageError(
            f"{type(model).__name__} has no transformers config: give a model loaded with transformers"
        )
    text = config.get_text_config()
    family = _family(text.model_type, named)
    path = named.blocks or _blocks_path(model, family, text)
    blocks = dict(model.named_modules()).get(path)
    if not isinstance(blocks, nn.ModuleList):
        raise UsageError(
            f"blocks is {path!r}: the model has no list of modules of that path; it has {_lists(model)}"
        )
    return [_block(model, f"{path}.{i}", i, one, family, text) for i, one in enumerate(blocks)]


def _family(model_type: str, named: ArchitectureConfig) -> Family:
    family = FAMILIES.get(model_type, LLAMA_LIKE)
    return Family(
        attention=named.attention or family.attention,
        mlp=named.mlp or family.mlp,
        norm=named.norm or family.norm,
        projections={**family.projections, **named.projections},
    )


def _lists(model: nn.Module) -> str:
    return ", ".join(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)) or "none at all"


def _blocks_path(model: nn.Module, family: Family, text: Any) -> str:
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != text.num_hidden_layers:
            continue
        if all(_child(one, family.attention) is not None for one in module):
            return path
    raise UsageError(
        f"no decoder blocks with a module {family.attention!r} were found in {text.model_type}: give "
        "MoAConfig(architecture=ArchitectureConfig(blocks=..., attention=..., mlp=..., projections={...})); "
        f"the model's lists of modules are {_lists(model)}"
    )


def _child(module: nn.Module, path: str | None) -> nn.Module | None:
    for name in path.split(".") if path else []:
        found = getattr(module, name, None)
        if not isinstance(found, nn.Module):
            return None
        module = found
    return module if path else None


def _block(model: nn.Module, path: str, index: int, module: nn.Module, family: Family, text: Any) -> Block:
    linear = _linear_sites(module, path, family, text)
    if not {"q_proj", "k_proj", "v_proj"} <= linear.keys():
        raise UsageError(
            f"{type(module).__name__} has no q_proj, k_proj and v_proj where {family.projections} look for them: "
            "give MoAConfig(architecture=ArchitectureConfig(projections={'q_proj': 'path.in.block', ...}))"
        )
    hidden_size = linear["q_proj"].in_features
    sites: dict[str, LinearSite | AttentionSite] = dict(linear)
    refusals: dict[str, str] = {}
    mlp = _child(module, family.mlp)
    if mlp is None:
        refusals["mlp"] = f"its block has no module {family.mlp!r}; name one in ArchitectureConfig(mlp=...)"
    else:
        sites["mlp"] = LinearSite(
            name="mlp",
            module=mlp,
            path=f"{path}.{family.mlp}",
            in_features=hidden_size,
            out_features=hidden_size,
        )
    attention = _child(module, family.attention)
    reason = _no_prompt(model, attention, text)
    if reason or attention is None:
        refusals["attention"] = reason or f"its block has no module {family.attention!r}"
    else:
        sites["attention"] = _attention_site(
            attention, f"{path}.{family.attention}", linear, hidden_size, text
        )
    gate, up = (_child(mlp, "act_fn"), _child(mlp, "up_proj")) if mlp is not None else (None, None)
    gated = text.model_type in GATED_MLPS and gate is not None and up is not None and "down_proj" in linear
    return Block(
        mlp_output_path=linear["down_proj"].path if gated else None,
        mlp_factors=(gate, up) if gated and gate is not None and up is not None else (),
        index=index,
        path=path,
        module=module,
        family=text.model_type,
        hidden_size=hidden_size,
        attention=attention,
        projection_input=linear["q_proj"].module,
        projection_input_path=linear["q_proj"].path,
        block_input_path=f"{path}.{family.norm}" if family.norm else linear["q_proj"].path,
        block_input=_child(module, family.norm) if family.norm else linear["q_proj"].module,
        sites=sites,
        refusals=refusals,
    )


def _no_prompt(model: nn.Module, attention: nn.Module | None, text: Any) -> str:
    """Why a prompt cannot be attended to, or nothing."""
    can_set: Callable[[], bool] = getattr(model, "_can_set_attn_implementation", lambda: False)
    if not hasattr(attention, "config") or not can_set():
        return "its attention does not go through transformers' attention interface"
    if getattr(text, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn computes attention outside transformers' attention interface"
    assert attention is not None, "what has a config is not None"
    for name, child in attention.named_children():
        known = name in ("q_norm", "k_norm") and getattr(getattr(child, "weight", None), "ndim", 0) == 1
        if "norm" in name and not known:
            return f"its attention has a norm {name!r} of a kind that is not known here"
    return ""


def _attention_site(
    module: nn.Module, path: str, linear: Mapping[str, LinearSite], hidden_size: int, text: Any
) -> AttentionSite:
    queries, keys = linear["q_proj"].out_features, linear["k_proj"].out_features
    head_size = int(getattr(module, "head_dim", None) or queries // text.num_attention_heads)
    return AttentionSite(
        name="attention",
        module=module,
        path=path,
        hidden_size=hidden_size,
        num_heads=queries // head_size,
        num_key_value_heads=keys // head_size,
        head_size=head_size,
        key=linear["k_proj"],
        value=linear["v_proj"],
    )


def _linear_sites(block: nn.Module, path: str, family: Family, text: Any) -> dict[str, LinearSite]:
    sites: dict[str, LinearSite] = {}
    for name, where in family.projections.items():
        layer_path = where.path if isinstance(where, Part) else where
        module = _child(block, layer_path)
        if module is None:
            continue
        inputs, outputs = _features(module)
        slot = _slot(where, outputs, text) if isinstance(where, Part) else None
        sites[name] = LinearSite(
            name=name,
            module=module,
            path=f"{path}.{layer_path}",
            in_features=inputs,
            out_features=slot.groups * slot.size if slot else outputs,
            slot=slot,
        )
    return sites


def _features(module: nn.Module) -> tuple[int, int]:
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]  # typed as Tensor | Module
    inputs, outputs = module.weight.shape  # type: ignore[union-attr, misc]  # transformers' Conv1D keeps [in, out]
    return int(inputs), int(outputs)


def _slot(part: Part, outputs: int, text: Any) -> Slot:
    heads = int(text.num_attention_heads)
    sizes = _sizes(part.order, outputs, heads, int(getattr(text, "num_key_value_heads", None) or heads))
    groups = heads if part.per_head else 1
    position = part.order.index(part.name)
    return Slot(
        groups=groups,
        width=outputs // groups,
        start=sum(sizes[:position]) // groups,
        size=sizes[position] // groups,
    )


def _sizes(order: Sequence[str], outputs: int, heads: int, key_value_heads: int) -> list[int]:
    shares = {"q_proj": heads, "k_proj": key_value_heads, "v_proj": key_value_heads}
    weights = [shares.get(name, 1) for name in order]
    return [outputs * weight // sum(weights) for weight in weights]
