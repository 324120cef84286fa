"""A row of results, and the figures in it."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moa_peft.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultRow:
    """The result of one model on one task, with what is needed to repeat it."""

    kind: Literal["evaluation"] = "evaluation"
    """What the row is of: a file may hold rows of training runs as well."""
    key: str
    """Hash of everything that decides the examples' results."""
    task: str
    """Name of the task."""
    source: str
    """Where its rows come from."""
    split: str
    """Which split of it."""
    limit: int | None
    """Rows taken from the start of the source; None for all."""
    data_md5: str
    """MD5 of the rows used, their contents and order."""
    file_md5: str | None
    """MD5 of the whole file of rows, unzipped; None where there is not one file."""
    n: int
    """Questions."""
    num_scored: int
    """Questions with an accuracy: in generation mode those with an answer, else those with choices."""
    accuracy: float | None
    """Share of the scored questions answered rightly, by the rule in ``extraction``, 0..1; None with none scored."""
    standard_error: float | None
    """Of the accuracy: sqrt(p (1 - p) / n)."""
    accuracies: Mapping[str, float | None]
    """The accuracy by every rule there is."""
    answer_loss: float | None
    """Mean over questions of the reference answer's loss, nats a token, its end token included; None without one
    and in mode text."""
    answer_loss_standard_error: float | None
    """Of that mean; None for fewer than two questions."""
    mode: Literal["likelihood", "generation", "text"]
    """Whether choices were compared by likelihood, answers were generated, or texts of choices were compared."""
    extraction: str
    """The rule behind ``accuracy``: "stated" or "official" of a reply, "sum" or "per_token" of likelihoods, "sum" or
    "per_character" of texts."""
    num_cut_off: int | None
    """Generated answers that had not ended after ``max_new_tokens``; None in other modes."""
    max_new_tokens: int | None
    """Most tokens of a generated answer; None in other modes."""
    template: str
    """How a row becomes text; "none" in mode text."""
    prompt_form: str
    """The prompt with {instruction} in the place of the row's instruction, or {question} in that of its question alone."""
    base_model: str
    """The base model, as it was named."""
    base_settings: Mapping[str, Any]
    """How it was loaded: arguments of `from_pretrained`, and the commit of one from the hub."""
    base_fingerprint: str
    """Hash of its weights."""
    adapter: str | None
    """The adapter's folder; None for the bare model or an adapter that lies in memory only."""
    adapter_fingerprint: str | None
    """Hash of its weights; None for the bare model."""
    method: str
    """The adapter's method; "frozen" for the bare model."""
    seed: int | None
    """Seed that the adapter was trained with; evaluation itself draws nothing at random."""
    batch_size: int
    """Most questions in a forward pass; changes nothing but rounding."""
    dtype: str
    """Of the base model's weights."""
    seconds: float
    """Time taken by the process that finished the row, loading not included."""
    num_resumed: int
    """Questions whose results an earlier process had left."""
    device: str
    """What it ran on."""
    threads: int
    """CPU threads."""
    versions: Mapping[str, str | None]
    """Of Python and the libraries."""
    commit: str | None
    """Of moa-peft's source; None for an installed package."""
    dirty: bool | None
    """Whether the source differed from that commit."""
    command: str
    """The command line."""
    taken_at: str
    """UTC, ISO 8601."""


def file_name(text: str) -> str:
    """A text, as a task's name, in letters that a file's name may have everywhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)


def proportion_standard_error(share: float, count: int) -> float:
    """The standard error of a share of ``count`` independent questions: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / count)


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of independent values, and its standard error from their spread (n - 1); None for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((one - mean) ** 2 for one in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float | None]:
    """The mean of ``first - second``, question by question, and its standard error, as `mean_and_standard_error` has it.

    Raises:
        UsageError: If the two are not of one length, or empty.
    """
    if len(first) != len(second) or not first:
        raise UsageError(
            f"a paired difference needs the same questions twice, got {len(first)} and {len(second)}"
        )
    return mean_and_standard_error([one - other for one, other in zip(first, second, strict=True)])
