# ruff: noqa: ARG002  # a callback of the trainer is given more than it needs
"""What a person sees while training runs: one bar, one short line a log."""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moa_peft.training.checkpoints import moved

_SHOWN = {
    "loss": "loss {:.4f}",
    "eval_loss": "held-out loss {:.4f}",
    "mean_token_accuracy": "token accuracy {:.3f}",
    "grad_norm": "gradient norm {:.3g}",
    "learning_rate": "learning rate {:.3g}",
    "router/active_experts": "active experts {:.2f}",
    "router/above_half_experts": "experts above half {:.2f}",
}


class StepClock(TrainerCallback):
    """Takes the time of every optimiser step: forward, backward, update; not evaluation, logging or saving.

    Attributes:
        seconds: One number a step.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._start)

    def median(self) -> float | None:
        """The median of all steps but the first, which warms up; seconds; None when no step was run."""
        return statistics.median(self.seconds[1:] or self.seconds) if self.seconds else None


class OwnIntervals(TrainerCallback):
    """Has a resumed run log, save and evaluate as its own recipe says, and find its best checkpoint where its folder now lies.

    The trainer would go by what the checkpoint says.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the intervals and the folder of the settings for those of the state."""
        state.compute_steps(args, state.max_steps)
        if state.best_model_checkpoint is not None:
            state.best_model_checkpoint = moved(state.best_model_checkpoint, Path(args.output_dir or "."))


class ProgressLines(TrainerCallback):
    """A bar over the optimiser steps and a short line for each log, both on standard error."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, at the step that a resumed run starts from."""
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a line with the figures a person looks for; all of them are in the checkpoint's trainer_state.json."""
        line = log_line(logs or {})
        if self._bar is not None and line:
            self._bar.write(f"step {state.global_step}: {line}", file=sys.stderr)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar where it is open, so that what follows starts on a line of its own."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def log_line(logs: dict[str, Any]) -> str:
    """Choose and word the figures of one log.

    Args:
        logs: What the trainer logs.

    Returns:
        The line; empty when it holds neither a training nor a held-out loss.
    """
    if "loss" not in logs and "eval_loss" not in logs:
        return ""
    return ", ".join(text.format(float(logs[name])) for name, text in _SHOWN.items() if name in logs)
