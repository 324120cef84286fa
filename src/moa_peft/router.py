"""Routers: modules that hold a router's weights and turn a block's tokens into gates.

Sizes: B rows, T tokens of a row, D hidden size, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_peft.config import RouterConfig
from moa_peft.routing import learned_threshold, sigmoid_gates, sparse_gates


def low_precision_product(x: Tensor, linear: nn.Linear) -> Tensor:
    """Multiply by a router's weight in the dtype of ``x``, then go on in float32.

    The input is never cast upwards: that would copy the whole residual stream of a bfloat16 model.

    Args:
        x: Float, [B, T, D].
        linear: Weight [H, D] and bias [H] of any float dtype.

    Returns:
        Float32, [B, T, H].
    """
    product = F.linear(x, linear.weight.to(x.dtype)).float()
    return product if linear.bias is None else product + linear.bias.float()


def zero_bias_linear(inputs: int, outputs: int) -> nn.Linear:
    """Torch's default linear layer with its bias at zero."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.bias)
    return linear


class LinearRouter(nn.Module):
    """Logits ``W x + b``."""

    def __init__(self, hidden_size: int, num_experts: int, config: RouterConfig) -> None:  # noqa: ARG002
        super().__init__()
        self.linear = zero_bias_linear(hidden_size, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, D] to float32 logits [B, T, E]."""
        return low_precision_product(x, self.linear)


class SwiGLURouter(nn.Module):
    """Logits ``W2 (SiLU(W1 x) * W3 x)``, each product with a bias; hidden size ``hidden_per_expert * E``.

    Source: the official code's math setting (MoA, arXiv 2506.05928).
    """

    def __init__(self, hidden_size: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        hidden = (config.hidden_per_expert or 4) * num_experts
        self.w1 = zero_bias_linear(hidden_size, hidden)
        self.w2 = zero_bias_linear(hidden, num_experts)
        self.w3 = zero_bias_linear(hidden_size, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, D] to float32 logits [B, T, E]."""
        hidden = F.silu(low_precision_product(x, self.w1)) * low_precision_product(x, self.w3)
        return F.linear(hidden, self.w2.weight.float(), self.w2.bias.float())


_LOGITS = {"linear": LinearRouter, "swiglu": SwiGLURouter}


class Router(nn.Module):
    """A block's router: logits, gates and, for Sparse MoA, the threshold."""

    def __init__(self, hidden_size: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.logits = _LOGITS[config.kind](hidden_size, num_experts, config)
        learned = config.threshold is not None and config.threshold.maximum is not None
        self.threshold = zero_bias_linear(hidden_size, 1) if learned else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weigh a block's experts for each token.

        Args:
            x: Float, [B, T, D], what the router reads.

        Returns:
            Gates, float32 [B, T, E], and the threshold, float32 broadcastable to [B, T, 1], or None for Soft MoA.
        """
        with torch.autocast(x.device.type, enabled=False):  # autocast would round the float32 part again
            scores = sigmoid_gates(self.logits(x))
            threshold = self._threshold(x)
        sparse = self.config.threshold
        if sparse is None or threshold is None:
            return scores, None
        return sparse_gates(
            scores, threshold, bandwidth=sparse.bandwidth, at_least_one=sparse.at_least_one
        ), threshold

    def untrained(self) -> list[nn.Parameter]:
        """Parameters that the config declares untrained: those of the official dead threshold."""
        sparse = self.config.threshold
        if self.threshold is None or sparse is None or sparse.gradient != "none":
            return []
        return list(self.threshold.parameters())

    def _threshold(self, x: Tensor) -> Tensor | None:
        sparse = self.config.threshold
        if sparse is None:
            return None
        if sparse.constant is not None:
            return x.new_full((1, 1, 1), sparse.constant, dtype=torch.float32)
        assert self.threshold is not None, "ThresholdConfig has either a constant or a maximum"
        assert sparse.maximum is not None, "ThresholdConfig has either a constant or a maximum"
        threshold = learned_threshold(low_precision_product(x, self.threshold), sparse.maximum)
        return threshold.detach() if sparse.gradient == "none" else threshold
