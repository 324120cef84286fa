"""What a run will do, and what it gave."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run will do, known before its first step."""

    method: str
    """The method of the family."""
    model: str
    """The base model, as the recipe names it."""
    rows_kept: int
    """Training rows."""
    rows_dropped: int
    """Rows left out, because max_length would cut their answers away."""
    validation_rows: int
    """Held-out rows; 0 for none."""
    validation_rows_dropped: int
    """Held-out rows left out likewise."""
    trainable_parameters: int
    """Numbers that are trained."""
    total_parameters: int
    """Numbers in all, the frozen model's included."""
    steps: int
    """Optimiser steps of the whole run."""
    output_dir: str
    """Where everything will lie."""
    resume_from: str | None
    """The checkpoint gone on from; None for a start from the frozen model."""
    resumed: bool
    """Whether the recipe asks to go on with a run."""
    skipped: tuple[str, ...]
    """Incomplete checkpoints that a resumed run leaves out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOutcome:
    """What a run gave."""

    output_dir: str
    """Where the adapter, its card, the recipe, the results and the checkpoints lie."""
    steps: int
    """Optimiser steps of the whole run, those before a resumption included."""
    final_loss: float | None
    """The training loss last logged, nats a token of the answers: a mean over the steps since the log before, or since the
    checkpoint that the run went on from, so that it is the same only where checkpoints lie at logged steps."""
    validation_loss: float | None
    """The held-out loss at the end, nats a token of the answers; None without held-out rows."""
    step_s: float | None
    """Median seconds a step of this process, without evaluation and saving; None when there was nothing left to do."""
    train_s: float
    """Seconds from the first step to the last, evaluation and saving included, of this process."""
    trainable_parameters: int
    """Numbers trained."""
    total_parameters: int
    """Numbers in all, the frozen model's included."""
    rows_kept: int
    """Training rows."""
    rows_dropped: int
    """Rows left out, because max_length would cut their answers away."""
    validation_rows: int
    """Held-out rows; 0 for none."""
    validation_rows_dropped: int
    """Held-out rows left out likewise."""
