"""Routers: modules that hold a router's weights and turn tokens into gates.

A router's linear layers are parameters of its modules and not modules of their own; see `moa_peft.mixture.gates.Projection`.

Sizes: B rows, T tokens of a row, D inputs, H outputs of a linear layer, E experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_peft.errors import UsageError
from moa_peft.mixture.balance_loss import attach_loss, default_loss_scale
from moa_peft.mixture.config import GATES, RouterConfig
from moa_peft.mixture.gate_functions import load_balancing_loss
from moa_peft.mixture.gates import Gate, GateResult, Projection, add_projection, projection
from moa_peft.mixture.precision import in_float32, without_autocast


class LinearLogits(nn.Module):
    """Logits ``W x + b``; the bias starts at ``start``."""

    def __init__(self, inputs: int, num_experts: int, config: RouterConfig, start: float) -> None:
        super().__init__()
        add_projection(self, "linear", inputs, num_experts, bias=config.bias)
        if config.bias:
            nn.init.constant_(self.get_parameter("linear_bias"), start)

    def projections(self) -> tuple[Projection, ...]:
        """What reads the router's input."""
        return (projection(self, "linear"),)

    def forward(self, logits: Tensor) -> Tensor:
        """Give the float32 logits [..., E] as the layer made them."""
        return logits


class SwiGLULogits(nn.Module):
    """Logits ``W2 (SiLU(W1 x) * W3 x)``, each product with a bias; hidden size ``hidden_per_expert * E``.

    The bias of W2 starts at ``start``.

    Source: the official code's math setting (MoA, arXiv 2506.05928).
    """

    def __init__(self, inputs: int, num_experts: int, config: RouterConfig, start: float) -> None:
        super().__init__()
        hidden = (config.hidden_per_expert or 4) * num_experts
        add_projection(self, "w1", inputs, hidden, bias=config.bias)
        add_projection(self, "w2", hidden, num_experts, bias=config.bias)
        add_projection(self, "w3", inputs, hidden, bias=config.bias)
        if config.bias:
            nn.init.constant_(self.get_parameter("w2_bias"), start)

    def projections(self) -> tuple[Projection, ...]:
        """What reads the router's input."""
        return projection(self, "w1"), projection(self, "w3")

    def forward(self, first: Tensor, third: Tensor) -> Tensor:
        """Map what W1 and W3 made, float32 [..., hidden], to float32 logits [..., E]."""
        return linear(F.silu(first) * third, projection(self, "w2"))


_LOGITS: dict[str, type[LinearLogits] | type[SwiGLULogits]] = {"linear": LinearLogits, "swiglu": SwiGLULogits}


def linear(x: Tensor, layer: Projection) -> Tensor:
    """Multiply by a router's weight in the dtype of ``x``, then go on in float32.

    Args:
        x: Float, [..., D].
        layer: Weight [H, D] and bias [H] of any float dtype.

    Returns:
        Float32 (float64 for a float64 input), [..., H].
    """
    if x.dtype == layer.weight.dtype and x.dtype in (torch.float32, torch.float64):
        return F.linear(x, *layer)
    return in_float32(F.linear(x, layer.weight.to(x.dtype)), layer.bias)


def _kind(config: RouterConfig) -> type[Gate]:
    kind = GATES[config.gate]
    assert issubclass(kind, Gate), "register_gate has refused any other"
    return kind


def balance_of(config: RouterConfig) -> float:
    """The coefficient of a router's balance loss."""
    return _kind(config).default_balance if config.balance is None else config.balance


def has_losses(config: RouterConfig) -> bool:
    """Whether a loss of its own trains a router beside the model's."""
    return balance_of(config) > 0 or _kind(config).has_penalty(config)


def needs_tokens(config: RouterConfig) -> bool:
    """Whether a routing depends on which tokens are real."""
    return config.granularity == "instance" or has_losses(config)


class Routing(NamedTuple):
    """A router's result for the tokens of a call."""

    gates: Tensor
    """Float32, [B, T, E]; [B, 1, E] where a whole instance has the same."""
    threshold: Tensor | None
    """Float32, broadcastable to [B, T, 1]; None where the gate has none."""
    balance_loss: Tensor | None
    """Float32, a scalar, before its coefficient; None where there is none."""


class Router(nn.Module):
    """Logits, gates and the losses that keep a router in shape.

    Attributes:
        has_losses: Whether a loss of its own trains this router beside the model's.
        loss_scale: What the training loop multiplies its loss by before backward: 1 / accumulation steps, times the
            scale of fp16's gradient scaler. `moa_peft.mixture.balance_scaling` sets it; None for `default_loss_scale`.
    """

    def __init__(self, inputs: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        kind = _kind(config)
        self.logits = _LOGITS[config.kind](inputs, num_experts, config, kind.initial_logit(config))
        self.gate: Gate = kind(inputs, num_experts, config)
        self.balance = balance_of(config)
        self.has_losses = has_losses(config)
        self.loss_scale: float | Tensor | None = None

    def projections(self) -> tuple[Projection, ...]:
        """Every layer that reads the router's input: those of the logits, then those of the gate."""
        return (*self.logits.projections(), *self.gate.projections())

    def forward(
        self, x: Tensor, counted: Tensor | None = None, products: Sequence[Tensor] | None = None
    ) -> Routing:
        """Weight the experts per token.

        Args:
            x: Float, [B, T, D], what the router reads.
            counted: Bool, [B, T]; tokens that count in the balance loss. None counts all.
            products: ``x`` times the weight of each of `projections`, where that is made already.

        Returns:
            The gates, [B, T, E]; in training their gradient carries that of the losses.

        Raises:
            UsageError: If the training loop scales its loss in a way that is unknown; see `default_loss_scale`.
        """
        scale = self._scale(x.device) if self.has_losses else None
        with without_autocast(x.device):  # it would round the float32 part again
            layers = self.projections()
            if products is None:
                read = [linear(x, one) for one in layers]
            else:
                read = [in_float32(one, layer.bias) for one, layer in zip(products, layers, strict=True)]
            first = len(self.logits.projections())
            weights = self.gate(self.logits(*read[:first]), *read[first:])
            self._check(weights)
            if not self.has_losses:
                return Routing(weights.gates, weights.threshold, None)
            return self._with_losses(weights, counted, scale)

    @property
    def joins_down_product(self) -> bool:
        """Whether, as a block's router, its products are made together with those of experts: it reads, token by token, what q, k and v read."""
        return self.config.granularity == "token" and self.config.router_input == "projection"

    def untrained(self) -> list[nn.Parameter]:
        """Parameters that the config declares untrained."""
        return self.gate.untrained()

    def _scale(self, device: torch.device) -> Tensor | None:
        """What the losses' gradient is multiplied by; None where there is none, outside of training."""
        if not (self.training and torch.is_grad_enabled()):
            return None
        scale = default_loss_scale(device.type) if self.loss_scale is None else self.loss_scale
        if isinstance(scale, Tensor):
            return scale.to(device, torch.float32)
        return torch.full((), scale, dtype=torch.float32, device=device)  # no copy that waits for the device

    def _check(self, weights: GateResult) -> None:
        """Refuse what a gate from outside the package would lose without a word."""
        if weights.penalty is not None and not self.gate.has_penalty(self.config):
            raise UsageError(
                f"the gate {self.config.gate!r} gives a penalty that nothing asks for: let its has_penalty(config) say so"
            )
        if self.balance > 0 and (weights.load is None or weights.probability is None):
            raise UsageError(
                f"the gate {self.config.gate!r} gives no load and probability, which its balance loss is made of: give both, or "
                "balance=0"
            )

    def _with_losses(self, weights: GateResult, counted: Tensor | None, scale: Tensor | None) -> Routing:
        balance: Tensor | None = None
        total = weights.gates.new_zeros(())
        if self.balance > 0:
            assert weights.load is not None
            assert weights.probability is not None
            balance = load_balancing_loss(weights.load, weights.probability, counted)
            total = total + self.balance * balance
        if weights.penalty is not None:
            penalty = weights.penalty.flatten()
            counting = torch.ones_like(penalty) if counted is None else counted.flatten().to(penalty)
            total = total + (penalty * counting).sum() / counting.sum().clamp(min=1)
        gates = weights.gates
        if scale is not None:
            gates = attach_loss(gates, total, scale)
        return Routing(gates, weights.threshold, None if balance is None else balance.detach())
