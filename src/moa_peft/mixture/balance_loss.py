"""The balance loss's way into training: its gradient is attached to the gates, so that every training loop has it.

A loss that is collected on the side is dropped by some trainers and cut off by reentrant checkpointing. Here the gates
pass through an identity whose backward pass also sends a gradient to the loss: wherever the gates' gradient flows, the
balance loss's flows too.
"""

from typing import Any

import torch
from accelerate.state import GradientState
from torch import Tensor

from moa_peft.errors import UsageError


class _Attached(torch.autograd.Function):
    """The one autograd function here: no sum of tensors adds a loss whose factor does not depend on the incoming gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gates: Tensor, loss: Tensor, scale: Tensor) -> Tensor:  # noqa: ARG004  # torch calls it by position
        return gates.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004  # torch's
        _, loss, scale = inputs
        ctx.save_for_backward(scale.to(loss.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradients[0], scale.clone(), None


def attach_loss(gates: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """Give the gates back unchanged; their backward pass also backpropagates ``scale * loss``.

    Args:
        gates: Float32, [B, T, E], with a gradient.
        loss: Float32, a scalar.
        scale: Float32, a scalar: what the training loop multiplies its own loss by before it calls backward.

    Returns:
        The gates.
    """
    return _Attached.apply(gates, loss, scale)


def default_loss_scale(device_type: str) -> float:
    """The factor that the training loop multiplies its loss by, where the loop has not set it.

    accelerate's own ``accumulate`` and ``backward`` divide by its number of steps; everything else is taken to call
    backward on the mean loss of one batch.

    Args:
        device_type: Where the model is, as in "cuda".

    Returns:
        1 / accelerate's accumulation steps.

    Raises:
        UsageError: If gradients are accumulated in a way that cannot be seen here, or scaled for fp16.
    """
    own_loop = (
        "in a loop of your own call moa_peft.mixture.balance_scaling.set_loss_scale(model, scale) with what you multiply the "
        "loss by before backward"
    )
    callback = (
        "give your Trainer callbacks=[moa_peft.mixture.balance_scaling.BalanceLossScale()] (one that is built after the "
        "mixture has it already)"
    )
    is_known = torch.amp.is_autocast_available(device_type)  # the meta device is not
    if (
        is_known
        and torch.is_autocast_enabled(device_type)
        and torch.get_autocast_dtype(device_type) == torch.float16
    ):
        raise UsageError(
            f"the balance loss does not know by what fp16's gradient scaler multiplies the loss: {callback}, or "
            f"{own_loop}, or train in bf16"
        )
    accelerate: dict[str, Any] = GradientState._shared_state
    steps = accelerate.get("plugin_kwargs", {}).get("num_steps", 1)
    if steps == 1 and not accelerate.get("sync_gradients", True):
        raise UsageError(
            f"the balance loss does not know over how many batches gradients are accumulated: {callback}, or {own_loop}"
        )
    return 1 / steps
