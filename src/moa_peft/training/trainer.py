"""The trainer: TRL's, which stops before a bad number reaches the weights and whose checkpoints say when they are whole."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments
from trl.trainer import utils as trl_forward
from trl.trainer.sft_trainer import SFTTrainer

from moa_peft.errors import UsageError
from moa_peft.mixture.token_watch import prompt_labels
from moa_peft.training import checkpoints
from moa_peft.training.optimizer import parameter_groups
from moa_peft.training.output_folder import disk_errors_named

NEXT_STEP = "start a new run in another output_dir with a lower learning_rate, bf16 instead of fp16, or a lower max_grad_norm"


class AdapterTrainer(SFTTrainer):
    """TRL's `SFTTrainer` with the guards of `moa train`.

    It sends no telemetry and writes no model card of its own.

    Attributes:
        keep_checkpoints: Complete checkpoints to keep; None keeps all. The config's ``save_total_limit`` must be
            None, for the trainer would delete an old checkpoint before the new one is known to be complete.
        extra_figures: Gives more figures for the log at each logging step of training; None for none.
        lr_factors: The factors of `parameter_groups`, by name; None for the trainer's own groups.
    """

    keep_checkpoints: int | None = None
    extra_figures: Callable[[], Mapping[str, float]] | None = None
    lr_factors: Mapping[str, float] | None = None
    _held_out: list[Tensor]

    @property
    def wrapped(self) -> PeftModel:
        """The model with its adapter."""
        assert isinstance(self.model, PeftModel)
        return self.model

    def restore(self, checkpoint: Path) -> None:
        """Take up the weights and the state of a run that had reached its last step.

        The trainer's own resumption would go on for one step more where the last step lies within an epoch.

        Args:
            checkpoint: A complete checkpoint of the last step.
        """
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None:
            self.state.best_model_checkpoint = checkpoints.moved(best, checkpoint.parent)
            self._load_best_model()

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:  # type: ignore[override]  # the factors are the instance's
        """Choose the optimizer as the trainer does, with the parameter groups that `lr_factors` ask for."""
        kind, settings = super().get_optimizer_cls_and_kwargs(args, model)
        if self.lr_factors is not None:
            if not issubclass(kind, torch.optim.Optimizer) or settings.keys() & {
                "params",
                "model",
                "optimizer_dict",
            }:
                raise UsageError(
                    f"optim is {args.optim}: it groups the parameters itself, so {' and '.join(self.lr_factors)} would have "
                    "no effect; choose optim adamw_torch, or leave the factors out (those of soft-lora by another method)"
                )
            rates = {"learning_rate": args.learning_rate, "weight_decay": args.weight_decay}
            settings["params"] = parameter_groups(model, **rates, **self.lr_factors)
        return kind, settings

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as TRL does; a loss of its own, such as label smoothing, keeps the labels from the model.

        TRL has waited for the device by then, to count right tokens, so looking at the loss costs no further wait.

        Returns:
            The loss, with the outputs when they are asked for.

        Raises:
            UsageError: If the loss is not finite, before it reaches the gradients.
        """
        if self.label_smoother is not None or self.compute_loss_func is not None:
            inputs = {**inputs, **prompt_labels(self.wrapped, inputs["labels"])}
        with answers_only_head(self.args.device):
            result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not math.isfinite(loss.item()):
            step = self.state.global_step
            what = f"loss of step {step + 1}" if self.wrapped.training else f"held-out loss after step {step}"
            raise UsageError(self._stopped(f"the {what} is {loss.item()}"))
        return result

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Score held-out rows as the trainer does, and note their losses by the number of their answer tokens."""
        counts = (inputs["labels"][:, 1:] != -100).sum(dim=-1)
        result = super().prediction_step(model, inputs, *args, **kwargs)
        counts = counts.to(result[0].device).float()
        sums = torch.stack([result[0].float() * counts, counts], dim=-1)  # [B, 2]
        self._held_out.append(cast("Tensor", self.accelerator.gather_for_metrics(sums)))
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the trainer does, with the mean loss over tokens in the place of that over batches, which depends on their size.

        It is the negative log-likelihood, also where another loss is trained: one with label smoothing, dft, or that of the base's own
        routers beside it tells less of how good the model is.
        """
        self._held_out = []
        settings: Any = self.args
        trained = self.label_smoother, self.aux_loss_enabled, settings.loss_type
        self.label_smoother, self.aux_loss_enabled, settings.loss_type = None, False, "nll"
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            self.label_smoother, self.aux_loss_enabled, settings.loss_type = trained
        loss, tokens = torch.cat(self._held_out).cpu().double().sum(dim=0).tolist()
        metrics = cast("dict[str, float]", output.metrics)
        metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss / tokens
        return output

    def refuse_non_finite(self) -> None:
        """Raise a UsageError if the last step has left a trained parameter with numbers that are not finite; waits for the device."""
        trained = [(name, one) for name, one in self.wrapped.named_parameters() if one.requires_grad]
        finite = torch.stack([torch.isfinite(one.detach()).all() for _, one in trained]).tolist()
        bad = [name for (name, _), good in zip(trained, finite, strict=True) if not good]
        if bad:
            what = f"after step {self.state.global_step}, {bad[0]} holds numbers that are not finite"
            raise UsageError(self._stopped(what))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.refuse_non_finite()
        folder = Path(self.args.output_dir or ".")
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.unmark(checkpoint)
        try:
            with disk_errors_named(folder):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    checkpoints.mark_complete(checkpoint)
        except OSError:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        if self.args.should_save:
            checkpoints.prune(folder, self.keep_checkpoints, spare=self.state.best_model_checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with the extra figures beside the training loss."""
        if self.extra_figures is not None and "loss" in logs:
            logs.update(self.extra_figures())
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the card is written once, at the end of the run."""

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def _stopped(self, what: str) -> str:
        whole = checkpoints.find_checkpoints(Path(self.args.output_dir or ".")).complete
        good = f"the last checkpoint before it is {whole[-1]}" if whole else "there was no checkpoint yet"
        return f"{what}: training stopped, {good}; {NEXT_STEP}"


@contextmanager
def answers_only_head(device: torch.device) -> Iterator[None]:
    """Let TRL's LM head score the answers' positions alone on a CPU, as it does on a GPU; the loss is the same.

    TRL scores every position on devices that compile for each shape. A CPU does not, and the vocabulary for
    every token of every prompt takes a quarter of a step of the embedded default model.

    Args:
        device: Where the model is; anything but a CPU is left as it is.
    """
    scores_compactly = getattr(trl_forward, "_use_triton", None)  # asked for this one decision in that module
    if device.type != "cpu" or scores_compactly is None:
        yield
        return
    trl_forward._use_triton = lambda _device: True  # pyright: ignore[reportPrivateImportUsage]  # looked for above
    try:
        yield
    finally:
        trl_forward._use_triton = scores_compactly  # pyright: ignore[reportPrivateImportUsage]  # as it was
