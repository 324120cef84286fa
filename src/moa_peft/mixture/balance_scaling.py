# ruff: noqa: ARG002  # a callback of the trainer is given more than it needs
"""How training loops tell the balance loss by what they multiply their own loss before backward.

The balance loss is the mean over a batch's tokens and joins the gradient by itself (`moa_peft.mixture.balance_loss`). So that its
gradient is the mean over the batches of an optimiser step, it has to shrink by their number; so that fp16's gradient
scaler leaves it right, it has to grow by that scale. Processes average their gradients (DDP, FSDP, DeepSpeed), and
the mean of each one's own batches is what they should average.
"""

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from moa_peft.errors import UsageError
from moa_peft.mixture.block_hooks import mixtures_of
from moa_peft.mixture.router import Router


def set_loss_scale(model: nn.Module, scale: float | Tensor | None) -> None:
    """Tell a model's balance losses by what the training loop multiplies its own loss before backward.

    Args:
        model: Any model, wrapped or not; one without balance losses is left as it is.
        scale: Above 0, a number or a scalar of float32: 1 / (batches of the optimiser step), times the scale of
            fp16's gradient scaler. 0 computes the balance losses without training by them. None forgets it.
    """
    for router in _routers(model):
        router.loss_scale = scale


class BalanceLossScale(TrainerCallback):
    """Sets the scale of the balance losses in transformers' `Trainer` and all that is built on it, such as TRL's.

    A mixture with balance losses gives it to every trainer that is built after it. It follows the trainer's count of
    batches: ``gradient_accumulation_steps``, fewer in the last step of an epoch. A dataset without a length has no
    such last step.
    """

    def __init__(self) -> None:
        self._routers: list[Router] = []
        self._epoch_start = 0  # optimiser steps before this epoch
        self._batches: int | None = None  # of an epoch; None where it has no end

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        train_dataloader: Any,
        **kwargs: Any,
    ) -> None:
        """Find the routers, and where in its epoch a resumed run goes on."""
        self._routers = _routers(model)
        self._batches = len(train_dataloader) if has_length(train_dataloader) else None
        self._epoch_start = state.global_step
        if self._batches is not None and not args.ignore_data_skip:
            self._epoch_start -= state.global_step % _steps(self._batches, args.gradient_accumulation_steps)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where the next epoch starts."""
        self._epoch_start = state.global_step

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        """Set the scale of the step that begins, without waiting for the device.

        Raises:
            UsageError: If the gradients are scaled for fp16 by something that cannot be asked for its scale.
        """
        if not self._routers:
            return
        scaler = getattr(optimizer, "scaler", None)
        # so on a CPU; DeepSpeed's is a subclass, and scales by itself
        unscaled = type(optimizer) is AcceleratedOptimizer
        if args.fp16 and scaler is None and not unscaled:
            raise UsageError(
                "fp16 is on and the optimizer has no gradient scaler that the balance loss could follow, as under "
                "DeepSpeed: train in bf16, or give the routers balance=0"
            )
        part = 1 / self._batches_of_step(args, state)
        by_device: dict[torch.device, Tensor] = {}
        for router in self._routers:
            device = next(router.parameters()).device
            if device not in by_device:
                scale = torch.full((), part, device=device)
                by_device[device] = scale if scaler is None else scaler.scale(scale)
            router.loss_scale = by_device[device]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the scale: another loop may follow."""
        for router in self._routers:
            router.loss_scale = None

    def _batches_of_step(self, args: TrainingArguments, state: TrainerState) -> int:
        usual = args.gradient_accumulation_steps
        if self._batches is None:
            return usual
        done = (state.global_step - self._epoch_start) * usual
        return min(usual, self._batches - done)


def give_to_trainers() -> None:
    """Put `BalanceLossScale` among the callbacks that every trainer starts with; twice is once.

    A trainer of a model without balance losses does nothing with it. Where the list is not there, in a later
    transformers, accumulating gradients is refused until a trainer is given the callback.
    """
    from transformers import trainer  # slow to import, and only training needs it

    callbacks: list[Any] = getattr(trainer, "DEFAULT_CALLBACKS", [])
    if BalanceLossScale not in callbacks:
        callbacks.append(BalanceLossScale)


def _routers(model: nn.Module) -> list[Router]:
    return [
        router for mixture in mixtures_of(model) for router in mixture.routers().values() if router.has_losses
    ]


def _steps(batches: int, accumulated: int) -> int:
    """Optimiser steps of an epoch, as the trainer counts them."""
    return max(-(-batches // accumulated), 1)
