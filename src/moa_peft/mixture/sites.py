"""What a decoder block has that an expert can stand at: projections, an MLP, softmax attention.

Sizes: H query heads, G key/value heads, D head size, L vectors, W width of a fused output's group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

MIXER_INPUT, MLP_INPUT = "mixer", "mlp"
"""Names of the inputs that several layers read."""
KEY_NORMS = ("k_norm", "qk_norm", "k_layernorm", "key_layernorm")
VALUE_NORMS = ("v_norm",)
"""Norms of attention that keys and values go through."""


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
    reads: str = ""
    """Name of its input, the same for sites of a block that read the same tensor; empty for one that no other reads."""
    slot: Slot | None = None
    """Set where the projection is part of a fused layer."""


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """A block's softmax attention: what a prompt needs to know of it."""

    name: str
    module: nn.Module
    path: str
    num_heads: int
    num_key_value_heads: int
    key: LinearSite
    value: LinearSite
    """Where keys serve as values too, the key's."""

    reads: str = MIXER_INPUT

    @property
    def hidden_size(self) -> int:
        """What its projections read."""
        return self.key.in_features

    @property
    def head_size(self) -> int:
        """D, of a query."""
        return int(
            getattr(self.module, "head_dim", None) or self.key.out_features // self.num_key_value_heads
        )

    def project(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Map vectors [L, hidden] to keys and values [L, G, D] with the frozen projections and the model's norms.

        The layers' own ``forward`` is called, past every hook, so that no adapter adds to them.
        """
        keys, values = _frozen(self.key, vectors), _frozen(self.value, vectors)
        return self._normed(keys, KEY_NORMS), self._normed(values, VALUE_NORMS)

    def _normed(self, flat: Tensor, names: Sequence[str]) -> Tensor:
        heads = (-1, self.head_size)
        norm: Any = next(
            (one for name in names if (one := getattr(self.module, name, None)) is not None), None
        )
        if norm is None:
            return flat.unflatten(-1, heads)
        weight = getattr(norm, "weight", None)
        if weight is not None and weight.ndim == 1 and weight.numel() != self.head_size:
            # OLMo 2: all heads at once
            return norm(flat).unflatten(-1, heads)
        return norm(flat.unflatten(-1, heads))


@dataclass(frozen=True, kw_only=True)
class LatentAttentionSite(AttentionSite):
    """DeepSeek's latent attention: keys and values are expanded from one small vector, part of the key is beside it."""

    @property
    def head_size(self) -> int:
        """D, of a query."""
        attention: Any = self.module
        return int(attention.qk_nope_head_dim + attention.qk_rope_head_dim)

    def project(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Map vectors [L, hidden] to keys [L, H, D] and values [L, H, D of values]; see `AttentionSite.project`."""
        attention: Any = self.module
        own, rotated = attention.qk_nope_head_dim, attention.qk_rope_head_dim
        latent, shared = _frozen(self.key, vectors).split([attention.kv_lora_rank, rotated], dim=-1)
        expanded = _frozen(self.value, attention.kv_a_layernorm(latent)).unflatten(-1, (self.num_heads, -1))
        keys, values = expanded.split([own, expanded.shape[-1] - own], dim=-1)
        return torch.cat([keys, shared.unsqueeze(1).expand(-1, self.num_heads, -1)], dim=-1), values


def frozen_layer(module: nn.Module) -> Any:
    """The model's own layer, where another adapter of PEFT stands around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _frozen(site: LinearSite, vectors: Tensor) -> Tensor:
    projected = frozen_layer(site.module).forward(vectors)
    return projected if site.slot is None else site.slot.take(projected)


Site = LinearSite | AttentionSite


@dataclass(frozen=True, kw_only=True)
class Block:
    """One decoder block's parts."""

    index: int
    path: str
    module: nn.Module
    family: str
    kind: str
    """As in "attention, MLP"."""
    hidden_size: int
    attention: nn.Module | None
    """Its softmax attention."""
    projection_input: nn.Module
    """The layer whose input is what the mixer reads; in a block without one, what the MLP reads."""
    projection_input_path: str
    block_input: nn.Module | None
    """The module whose input is the block's input, read inside a checkpointed forward; None where none is known."""
    block_input_path: str
    sites: Mapping[str, Site]
    stand_ins: Mapping[str, tuple[str, ...]]
    """The sites that stand for a target beside, or instead of, the one of its name: a state space's in_proj for q_proj."""
    missing: Mapping[str, str]
    """Why a target has no site here, by the target's name."""

    def places(self, target: str) -> list[Site]:
        """The sites that a target names in this block, none where it has none."""
        own = [self.sites[target]] if target in self.sites else []
        return own + [self.sites[name] for name in self.stand_ins.get(target, ())]
