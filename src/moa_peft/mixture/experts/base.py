"""What every expert is: a small module at one site of a decoder block that returns its gated change.

A new kind is one file that registers a config (what the user writes) and a module (what holds the weights):

    @register_expert
    @dataclass(frozen=True, kw_only=True, slots=True)
    class MyExpert(ExpertConfig): ...       # kind, fields, site_names(), build()

Sizes: B rows, T tokens of a row, D_in and D_out of a site, H query heads of size D, G key/value heads, P vectors of a
prompt, N copies of an expert at its site.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_peft.errors import UsageError, unknown
from moa_peft.mixture.config import ExpertConfig, from_mapping

if TYPE_CHECKING:
    from moa_peft.mixture.sites import AttentionSite

Kind = TypeVar("Kind", bound=type[ExpertConfig])
_KINDS: dict[str, type[ExpertConfig]] = {}

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of a block, by the names they have in Llama."""


class Bottleneck(NamedTuple):
    """An expert as ``up (gate * scale * activation(down x + down_bias)) + gate * up_bias``, which is computed with others.

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
    """[D_out, N]."""
    activation: Callable[[Tensor], Tensor] | None = None

    def gated(self, inner: Tensor, gate: Tensor | None) -> Tensor:
        """Go from what the down-projection gives to what multiplies `ups`.

        Args:
            inner: Float, [B, T, N * r] or [B, T, r], ``down x``.
            gate: Float32, [B, T or 1, N] or [B, T or 1, 1]; None for 1.

        Returns:
            [B, T, N * r], with N more columns for the biases, if there are any; at least float32 with a gate.
        """
        if self.down_bias is not None:
            inner = inner + self.down_bias.to(inner.dtype)
        if self.activation is not None:
            inner = self.activation(inner)
        if self.scale != 1:
            inner = inner * self.scale
        if gate is None and self.up_bias is None:
            return inner
        if gate is None:
            gate = torch.ones_like(inner[..., :1])
        copies = gate.shape[-1] if self.up_bias is None else self.up_bias.shape[1]
        if gate.shape[-1] == 1 and inner.shape[-1] == self.up.shape[1]:
            rows = inner * gate
        else:
            by_copy = inner.unflatten(-1, (-1, self.up.shape[1] // copies))  # [B, T, N or 1, r]
            rows = (by_copy * gate.unsqueeze(-1)).flatten(-2)
        if self.up_bias is None:
            return rows
        return torch.cat([rows, gate.expand(*rows.shape[:-1], copies)], dim=-1)

    def ups(self) -> list[Tensor]:
        """What multiplies the gated vectors, [D_out, N * r], and the gates themselves, [D_out, N], if there are biases."""
        return [self.up] if self.up_bias is None else [self.up, self.up_bias]


class Prompt(NamedTuple):
    """Keys and values that queries attend to beside the text.

    Those of N copies are stacked, P / N each; the softmax is over all P.
    """

    keys: Tensor
    """[P, G, D], a head for each group of query heads."""
    values: Tensor
    """[P, G, D]."""
    head_scale: Tensor
    """[H]."""

    def scaled(self, scaling: float) -> "ScaledPrompt":
        """Give each query head its keys, times the factor of the attention scores, and its values, times its scale."""
        by_group = self.head_scale.view(self.keys.shape[1], -1, 1)
        keys = self.keys.unsqueeze(2).expand(-1, -1, by_group.shape[1], -1) * scaling  # [P, G, H / G, D]
        values = (self.values.unsqueeze(2) * by_group).to(self.values.dtype)
        return ScaledPrompt(keys.flatten(1, 2).permute(1, 2, 0), values.flatten(1, 2).transpose(0, 1))


class ScaledPrompt(NamedTuple):
    """What queries are multiplied by: ``sum_n gate_n softmax(Q_h keys_h)_n values_h``."""

    keys: Tensor
    """[H, D, P]."""
    values: Tensor
    """[H, P, D]."""

    def change(self, query: Tensor, gate: Tensor) -> Tensor:
        """Let queries attend to the prompt.

        Args:
            query: Float, [B, H, T, D], after rotary embedding, in the dtype of the prompt.
            gate: Float32, broadcastable to [B, T, N].

        Returns:
            [B, T, H, D] in the dtype of ``query``.
        """
        tokens = query.shape[0], query.shape[2]
        rows = query.transpose(1, 2).flatten(0, 1).transpose(0, 1)  # [H, B * T, D], mostly without a copy
        share = (rows @ self.keys).softmax(dim=-1)  # [H, B * T, P]
        gate = gate.expand(*tokens, -1).flatten(0, 1)  # [B * T, N]
        if gate.shape[-1] == 1:
            share = share * gate
        else:
            share = (share.unflatten(-1, (gate.shape[-1], -1)) * gate.unsqueeze(-1)).flatten(-2)
        return (share.to(query.dtype) @ self.values).transpose(0, 1).unflatten(0, tokens)


class Expert(nn.Module):
    """What all kinds of experts say of their parameters."""

    undecayed: ClassVar[frozenset[str]] = frozenset()
    """Parameters, beside biases, that weight decay must not shrink where it is selective: scales and prompts."""
    lora_b: ClassVar[frozenset[str]] = frozenset()
    """Parameters that are the B of a low-rank product, which LoRA+ trains at a rate of its own."""


class LinearExpert(Expert):
    """An expert beside a linear layer or a whole MLP: it sees that module's input and output.

    A kind is a bottleneck, and says so by `bottleneck`, or has a `change` of its own.
    """

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
        one = self.bottleneck()
        if one is None:
            raise NotImplementedError(f"{type(self).__name__} has neither bottleneck() nor change()")
        rows = one.gated(F.linear(x, one.down.to(x.dtype)), gate)
        return F.linear(rows.to(base.dtype), torch.cat(one.ups(), dim=1).to(base.dtype))

    def bottleneck(self) -> Bottleneck | None:
        """The weights of an expert that is a bottleneck, as they are now; None for one that is none.

        A bottleneck is computed together with others that read the same input, and its `change` is called only for observers.
        """
        return None


class AttentionExpert(Expert):
    """An expert beside a block's attention: it sees the queries and may project vectors to keys and values.

    A kind is a prompt, and says so by `prompt`, or has a `change` of its own.
    """

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
        prompt = self.prompt(site, query.dtype)
        if prompt is None:
            raise NotImplementedError(f"{type(self).__name__} has neither prompt() nor change()")
        return prompt.scaled(scaling).change(query, gate)

    def prompt(self, site: "AttentionSite", dtype: torch.dtype) -> Prompt | None:  # noqa: ARG002  # for subclasses
        """The keys and values of an expert that is a prompt, in ``dtype``, as its weights are now; None for one that is none."""
        return None


def register_expert(config_class: Kind) -> Kind:
    """Make a kind of expert known under its ``kind``; use it as a decorator of the config class.

    Raises:
        UsageError: If another class has registered the name, or no module can have it.
    """
    if not config_class.kind or "." in config_class.kind or "__" in config_class.kind:
        raise UsageError(
            f"expert kind {config_class.kind!r}: give a name without dots and double underscores"
        )
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


def target_problems(targets: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """Say what is wrong with an expert's ``targets``, whatever the model.

    Args:
        targets: As the user gave them; a text instead of a list is a mistake.
        allowed: Names for the advice; the model itself says which it has.

    Returns:
        A sentence for each problem.
    """
    if isinstance(targets, str):
        what = f"as in [{targets!r}]" if targets in allowed else f"of some of {', '.join(allowed)}"
        return [f"targets is the text {targets!r}: give a list, {what}"]
    wrong: list[str] = []
    if not targets:
        wrong.append(f"targets is empty: give some of {', '.join(allowed)}")
    beside = [one for one in targets if one in ("attention", "mlp") and one not in allowed]
    wrong += [f"targets names {one!r}: give some of {', '.join(allowed)}" for one in beside]
    if len(set(targets)) < len(targets):
        wrong.append(f"targets names a projection twice: {', '.join(targets)}")
    return wrong
