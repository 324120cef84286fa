"""In which precision a mixture computes.

Products are made in the dtype of the input, which is never cast upwards: that would copy the whole residual stream of a
half-precision model. Everything after a router's first product is float32.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING = nullcontext()


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


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device; it knows nothing of the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off inside the block; where it is off already, cheaply."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device) else _NOTHING
