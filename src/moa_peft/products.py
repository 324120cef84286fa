"""The products that routers and gates are made of.

Sizes: B rows, T tokens of a row, D inputs, H outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision up to float32; float64, which references are checked in, stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which routers go on after products in another: float32, or float64 for float64."""
    return dtype if dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast where there is something to cast: asking first is cheaper."""
    return x if x.dtype == dtype else x.to(dtype)


def low_precision_product(x: Tensor, linear: nn.Linear) -> Tensor:
    """Multiply by a router's weight in the dtype of ``x``, then go on in float32.

    The input is never cast upwards: that would copy the whole residual stream of a bfloat16 model.

    Args:
        x: Float, [B, T, D].
        linear: Weight [H, D] and bias [H] of any float dtype.

    Returns:
        Float32 (float64 for a float64 input), [B, T, H].
    """
    if x.dtype == linear.weight.dtype and x.dtype in (torch.float32, torch.float64):
        return F.linear(x, linear.weight, linear.bias)
    return in_float32(F.linear(x, linear.weight.to(x.dtype)), linear.bias)


def in_float32(product: Tensor, bias: Tensor | None) -> Tensor:
    """Go on in float32 with a product made in the dtype of its input, and add the bias [H], if there is one."""
    product = at_least_float32(product)
    return product if bias is None else product + bias.to(product.dtype)


def zero_bias_linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """Torch's default linear layer with its bias, if any, at zero."""
    linear = nn.Linear(inputs, outputs, bias=bias)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
