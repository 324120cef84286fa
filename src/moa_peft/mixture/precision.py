"""In which precision a mixture computes.

Products are made in the dtype of the input, which is never cast upwards: that would copy the whole residual stream of a
half-precision model. Everything after a router's first product is float32.
"""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision up to float32; float64, in which references are checked, stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor, without an operator where it has the dtype already: decoding one token is made of such small things."""
    return x if x.dtype == dtype else x.to(dtype)


def in_float32(product: Tensor, bias: Tensor | None) -> Tensor:
    """Go on in float32 with a product made in the dtype of its input, and add the bias [H], if there is one."""
    product = at_least_float32(product)
    return product if bias is None else product + cast(bias, product.dtype)
