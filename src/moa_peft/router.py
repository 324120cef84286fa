"""Routers: modules that hold a router's weights and turn tokens into gates.

Sizes: B rows, T tokens of a row, D inputs, E experts.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_peft.balance import attach_loss, scale_nobody_set
from moa_peft.config import GATES, RouterConfig
from moa_peft.gates import Gate, Weights
from moa_peft.products import at_least_float32, cast, exact, low_precision_product, zero_bias_linear
from moa_peft.routing import load_balancing_loss

_NOTHING = nullcontext()


class LinearRouter(nn.Module):
    """Logits ``W x + b``."""

    num_linears: ClassVar[int] = 1

    def __init__(self, inputs: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        self.linear = zero_bias_linear(inputs, num_experts, bias=config.bias)

    @property
    def last(self) -> nn.Linear:
        """The layer that makes the logits."""
        return self.linear

    def linears(self) -> tuple[nn.Linear, ...]:
        """What reads the router's input."""
        return (self.linear,)

    def forward(self, logits: Tensor) -> Tensor:
        """Give the float32 logits [..., E] as the layer made them."""
        return logits

    def of_rows(self, dtype: torch.dtype, then: "RowsOfRows | None" = None, dim: int = 0) -> "RowsOfRows":  # noqa: ARG002  # nothing is left to multiply
        """Give the function that does what `forward` does with a column for each token; see `SwiGLURouter.of_rows`."""
        return then or self.forward


class SwiGLURouter(nn.Module):
    """Logits ``W2 (SiLU(W1 x) * W3 x)``, each product with a bias; hidden size ``hidden_per_expert * E``.

    Source: the official code's math setting (MoA, arXiv 2506.05928).
    """

    num_linears: ClassVar[int] = 2

    def __init__(self, inputs: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        hidden = (config.hidden_per_expert or 4) * num_experts
        self.w1 = zero_bias_linear(inputs, hidden, bias=config.bias)
        self.w2 = zero_bias_linear(hidden, num_experts, bias=config.bias)
        self.w3 = zero_bias_linear(inputs, hidden, bias=config.bias)

    @property
    def last(self) -> nn.Linear:
        """The layer that makes the logits."""
        return self.w2

    def linears(self) -> tuple[nn.Linear, ...]:
        """What reads the router's input."""
        return (self.w1, self.w3)

    def forward(self, first: Tensor, third: Tensor) -> Tensor:
        """Map what W1 and W3 made, float32 [..., hidden], to float32 logits [..., E]."""
        return low_precision_product(F.silu(first) * third, self.w2)

    def of_rows(self, dtype: torch.dtype, then: "RowsOfRows | None" = None, dim: int = 0) -> "RowsOfRows":
        """Give the function that does what `forward` does with a column for each token, or a row.

        It holds the weights as they are now.

        Args:
            dtype: Of the product.
            then: Takes the logits, and the rows of what follows the router's own layers; None to give the logits.
            dim: Where the hidden units are: 0, with a column for each token; 1, with a row for each.
        """
        weight = cast(self.w2.weight, dtype)
        bias = None if self.w2.bias is None else cast(self.w2.bias, dtype).unsqueeze(1)
        if not torch.is_grad_enabled():
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        if dim == 1:
            weight, bias = weight.t(), None if bias is None else bias.t()

        def logits(first: Tensor, third: Tensor, *others: Tensor) -> Tensor:
            hidden = F.silu(first) * third
            factors = (weight, hidden) if dim == 0 else (hidden, weight)
            made = torch.mm(*factors) if bias is None else torch.addmm(bias, *factors)
            return made if then is None else then(made, *others)

        return logits


_LOGITS: dict[str, type[LinearRouter] | type[SwiGLURouter]] = {"linear": LinearRouter, "swiglu": SwiGLURouter}


RowsOfRows = Callable[..., Tensor]
"""Takes what each of several layers makes of M tokens, float32 [K, M] each, and gives logits or gates, float32 [E, M]."""


class Routing(NamedTuple):
    """What a router says of a call's tokens, with the leading sizes of what it was given."""

    gates: Tensor
    """Float32, [..., E]."""
    threshold: Tensor | None
    """Float32, broadcastable to [..., 1]; None where the gate has none."""
    balance_loss: Tensor | None
    """Float32, a scalar, before its coefficient; None where there is none."""


WeightsOfRows = Callable[[Tensor, Sequence[Tensor]], Weights]
"""Takes what a router reads, [M, D], and what each of its layers makes of that, [K, M] each; gives the weights [M, E]."""


class Read(NamedTuple):
    """What a router's layers made of its input, where others read it too."""

    weigh: WeightsOfRows
    rows: Sequence[Tensor]
    """[K, M] each."""


class Router(nn.Module):
    """Logits, gates and the losses that keep a router in shape.

    Attributes:
        has_losses: Whether a loss of its own trains this router beside the model's.
        loss_scale: What the training loop multiplies its loss by before backward: 1 / accumulation steps, times the
            scale of fp16's gradient scaler. `moa_peft.train.balance` sets it; None where nobody has.
    """

    def __init__(self, inputs: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.logits: LinearRouter | SwiGLURouter = _LOGITS[config.kind](inputs, num_experts, config)
        kind = GATES[config.gate]
        assert issubclass(kind, Gate), "register_gate takes gates only"
        self.gate: Gate = kind(inputs, num_experts, config)
        if config.bias:
            nn.init.constant_(self.logits.last.bias, self.gate.initial_logit(config))
        self.balance = kind.default_balance if config.balance is None else config.balance
        self.has_losses = self.balance > 0 or bool(config.target and config.sparsity != 0)
        self.loss_scale: float | Tensor | None = None

    def linears(self) -> tuple[nn.Linear, ...]:
        """Every layer that reads the router's input: those of the logits, then those of the gate."""
        return (*self.logits.linears(), *self.gate.linears())

    def forward(self, x: Tensor, counted: Tensor | None = None, read: Read | None = None) -> Routing:
        """Weigh the experts for each token.

        Args:
            x: Float, [B, T, D], what the router reads; M = B * T.
            counted: Bool, [B, T]; tokens that count in the balance loss. None counts all.
            read: What the router's layers made of ``x`` elsewhere; None to make it here.

        Returns:
            The gates, [B, T, E], or [M, E] of what was read elsewhere; in training their gradient carries that of the
            losses.

        Raises:
            UsageError: If the training loop scales its loss in a way that nobody has told; see `scale_nobody_set`.
        """
        scale = self._scale(x.device) if self.has_losses else None
        on = torch.is_autocast_enabled(x.device.type)  # it would round the float32 part again
        with torch.autocast(x.device.type, enabled=False) if on else _NOTHING:
            if read is None:
                layers = [low_precision_product(x, linear) for linear in self.linears()]
                first = self.logits.num_linears
                weights = self.gate(x, self.logits(*layers[:first]), *layers[first:])
            else:
                weights = read.weigh(x.reshape(-1, x.shape[-1]), read.rows)
            if not self.has_losses:
                return Routing(weights.gates, weights.threshold, None)
            return self._with_losses(weights, counted, scale)

    def of_rows(self, dtype: torch.dtype) -> WeightsOfRows:
        """Give the function that makes weights where the products with the input are there already.

        It holds the weights as they are now.

        Args:
            dtype: That of the products.
        """
        logits, gate = self.logits.of_rows(exact(dtype)), self.gate.forward
        num_logits = self.logits.num_linears

        def weigh(x: Tensor, rows: Sequence[Tensor]) -> Weights:
            rows = [at_least_float32(one) for one in rows]
            return gate(x, logits(*rows[:num_logits]).t(), *[one.t() for one in rows[num_logits:]])

        return weigh

    def gates_of_rows(self, dtype: torch.dtype, dim: int = 0) -> "RowsOfRows | None":
        """Give the function that makes the gates alone of what each layer made, [K, M] each, or [M, K].

        It holds the weights as they are now.

        Args:
            dtype: That of the products.
            dim: Where the K are, and the experts of what it gives.

        Returns:
            It gives float32, [E, M] or [M, E]; None for a gate that has no `Gate.of_rows`.
        """
        gate = self.gate.of_rows(dim)
        return None if gate is None else self.logits.of_rows(exact(dtype), gate, dim)

    @property
    def reads_projection_input(self) -> bool:
        """Whether, as a block's router, it reads token by token what q, k and v read."""
        return self.config.granularity == "token" and self.config.router_input == "projection"

    def untrained(self) -> list[nn.Parameter]:
        """Parameters that the config declares untrained."""
        return self.gate.untrained()

    def _scale(self, device: torch.device) -> Tensor | None:
        """What the losses' gradient is multiplied by; None where there is none, outside of training."""
        if not (self.training and torch.is_grad_enabled()):
            return None
        scale = scale_nobody_set(device.type) if self.loss_scale is None else self.loss_scale
        if isinstance(scale, Tensor):
            return scale.to(device, torch.float32)
        return torch.full((), scale, dtype=torch.float32, device=device)  # no copy that waits for the device

    def _with_losses(self, weights: Weights, counted: Tensor | None, scale: Tensor | None) -> Routing:
        balance: Tensor | None = None
        total = weights.gates.new_zeros(())
        if self.balance > 0 and weights.load is not None and weights.probability is not None:
            balance = load_balancing_loss(weights.load, weights.probability, counted)
            total = total + self.balance * balance
        if weights.penalty is not None:
            penalty = weights.penalty.flatten()
            counting = torch.ones_like(penalty) if counted is None else counted.flatten().to(penalty.dtype)
            total = total + (penalty * counting).sum() / counting.sum().clamp(min=1)
        gates = weights.gates
        if scale is not None:
            gates = attach_loss(gates, total, scale)
        return Routing(gates, weights.threshold, None if balance is None else balance.detach())
