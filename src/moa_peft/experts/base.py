"""What every expert is: a small module at one site of a decoder block that returns its gated change.

A new kind is one file that registers a config (what the user writes) and a module (what holds the weights):

    @register_expert
    @dataclass(frozen=True, kw_only=True, slots=True)
    class MyExpert(ExpertConfig): ...       # kind, fields, site_names(), build()

Sizes: B rows, T tokens of a row, D_in and D_out of a site, H heads of size D, N copies of an expert at
its site.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from moa_peft.config import ExpertConfig, from_mapping
from moa_peft.errors import UsageError, unknown

if TYPE_CHECKING:
    from moa_peft.architecture import AttentionSite

Kind = TypeVar("Kind", bound=type[ExpertConfig])
_KINDS: dict[str, type[ExpertConfig]] = {}


class Bottleneck(NamedTuple):
    """An expert as ``up (gate * scale * activation(down x + down_bias)) + gate * up_bias``, which the fused path joins with others.

    Its N copies are stacked, r rows or columns each.
    """

    down: Tensor
    """[N * r, D_in], or [r, D_in] where the copies share it."""
    up: Tensor
    """[D_out, N * r]."""
    scale: float = 1.0
    down_bias: Tensor | None = None
    """[N * r] or [r]."""
    up_bias: Tensor | None = None
    """[D_out * N], the N of an output side by side."""
    activation: Callable[[Tensor], Tensor] | None = None


class Prompt(NamedTuple):
    """An expert as ``head_scale_h * sum_n gate_n softmax(Q_h K_h^T * scaling)_n V_h``, which the fused path computes.

    Its N copies are stacked, P / N vectors each; the softmax is over all P.
    """

    keys: Tensor
    """[H, P, D]."""
    values: Tensor
    """[H, P, D]."""
    head_scale: Tensor
    """[H]."""


class LinearExpert(nn.Module):
    """An expert beside a linear layer or a whole MLP: it sees that module's input and output."""

    starts_at_zero: ClassVar[bool] = True
    """Whether a fresh expert leaves the model bit-equal to the frozen one."""
    undecayed: ClassVar[frozenset[str]] = frozenset()
    """Parameters, beside biases, that weight decay must not shrink where it is selective: scales and prompts."""
    lora_b: ClassVar[frozenset[str]] = frozenset()
    """Parameters that are the B of a low-rank product, which LoRA+ trains at a rate of its own."""

    def change(self, x: Tensor, base: Tensor, gate: Tensor) -> Tensor:
        """Give the gated change of the site's output.

        The gate goes where it is cheapest: ``g * B (A x) = B (g * A x)`` gates r numbers instead of D_out.

        Args:
            x: Float, [B, T, D_in], the site's input.
            base: Float, [B, T, D_out], the frozen module's output (its own slice of a fused one).
            gate: Float32, broadcastable to [B, T, N]: one for each of the expert's copies, of which there is mostly one.

        Returns:
            [B, T, D_out] in the dtype of ``base``.
        """
        raise NotImplementedError

    @property
    def is_bottleneck(self) -> bool:
        """Whether `bottleneck` says what `change` computes, so that the fused path may join it with others."""
        return False

    def bottleneck(self) -> Bottleneck:
        """The weights of an expert that is a bottleneck, as they are now."""
        raise NotImplementedError


class AttentionExpert(nn.Module):
    """An expert beside a block's attention: it sees the queries and may project vectors to keys and values."""

    starts_at_zero: ClassVar[bool] = True
    """Whether a fresh expert leaves the model bit-equal to the frozen one."""
    undecayed: ClassVar[frozenset[str]] = frozenset()
    """Parameters, beside biases, that weight decay must not shrink where it is selective: scales and prompts."""
    lora_b: ClassVar[frozenset[str]] = frozenset()
    """Parameters that are the B of a low-rank product, which LoRA+ trains at a rate of its own."""

    def change(self, site: "AttentionSite", query: Tensor, scaling: float, gate: Tensor) -> Tensor:
        """Give the gated change of the attention's output, before o_proj.

        Args:
            site: The block's attention, which projects vectors with the frozen weights.
            query: Float, [B, H, T, D], after rotary embedding.
            scaling: Factor of the attention scores, the model's own.
            gate: Float32, broadcastable to [B, T, N]: one for each of the expert's copies, of which there is mostly one.

        Returns:
            [B, T, H, D] in the dtype of ``query``.
        """
        raise NotImplementedError

    @property
    def is_prompt(self) -> bool:
        """Whether `prompt` says what `change` computes, so that the fused path may compute it."""
        return False

    def prompt(self, site: "AttentionSite", dtype: torch.dtype) -> Prompt:
        """The keys and values of an expert that is a prompt, in ``dtype``, as its weights are now."""
        raise NotImplementedError


def register_expert(config_class: Kind) -> Kind:
    """Make a kind of expert known under its ``kind``; use it as a decorator of the config class.

    Raises:
        UsageError: If another class has registered the name.
    """
    if config_class.kind in _KINDS:
        holder = _KINDS[config_class.kind].__module__
        raise UsageError(
            f"expert {config_class.kind!r} is already registered by {holder}: choose another kind"
        )
    _KINDS[config_class.kind] = config_class
    return config_class


def expert_kinds() -> dict[str, type[ExpertConfig]]:
    """Every registered kind by name."""
    return dict(_KINDS)


def expert_from_mapping(values: Mapping[str, Any]) -> ExpertConfig:
    """Build an expert's config from a file's mapping, whose "kind" says which.

    Raises:
        UsageError: If the kind or a field is unknown (with the nearest known name), or the kind is missing.
    """
    if "kind" not in values:
        raise UsageError(f"an expert has no kind: give kind as one of {', '.join(sorted(_KINDS))}")
    kind = values["kind"]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UsageError(unknown("expert", str(kind), _KINDS))
    fields = {key: value for key, value in values.items() if key != "kind"}
    return from_mapping(_KINDS[kind], fields, f"field of expert {kind!r}")
