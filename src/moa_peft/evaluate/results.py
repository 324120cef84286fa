"""Results on disk: rows of JSON lines that survive a kill, and the figures in them."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moa_peft.errors import UsageError

RESULTS_FILE = "results.jsonl"
"""Where result rows are appended, in the folder of results."""


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
    """Questions with an accuracy: in likelihood mode those with choices, in generation mode those with an answer."""
    accuracy: float | None
    """Share of the scored questions answered rightly, by the rule in ``extraction``, 0..1; None with none scored."""
    standard_error: float | None
    """Of the accuracy: sqrt(p (1 - p) / n)."""
    accuracies: Mapping[str, float | None]
    """The accuracy by every rule there is."""
    answer_loss: float | None
    """Mean over questions of the reference answer's loss, nats a token, its end token included; None without one."""
    answer_loss_standard_error: float | None
    """Of that mean; None for fewer than two questions."""
    mode: Literal["likelihood", "generation"]
    """Whether choices were compared by likelihood or answers were generated."""
    extraction: str
    """The rule behind ``accuracy``: "stated" or "official" of a reply, "sum" or "per_token" of likelihoods."""
    num_cut_off: int | None
    """Generated answers that had not ended after ``max_new_tokens``; None in likelihood mode."""
    max_new_tokens: int | None
    """Most tokens of a generated answer; None in likelihood mode."""
    template: str
    """How a row becomes text."""
    prompt_form: str
    """The prompt with {instruction} in the place of the question."""
    base_model: str
    """The base model, as it was named."""
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
    """The mean of ``first - second``, question by question, and its standard error.

    Args:
        first: One value a question.
        second: The same questions in the same order.

    Returns:
        As `mean_and_standard_error` of the differences.

    Raises:
        UsageError: If the two are not of one length, or empty.
    """
    if len(first) != len(second) or not first:
        raise UsageError(
            f"a paired difference needs the same questions twice, got {len(first)} and {len(second)}"
        )
    return mean_and_standard_error([one - other for one, other in zip(first, second, strict=True)])


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a last line that a kill cut off is left out.

    Args:
        file: The file; need not exist.

    Returns:
        The rows.

    Raises:
        UsageError: If another line is not a JSON object.
    """
    return _whole_lines(file)[0]


def drop_torn_line(file: Path) -> bool:
    """Take a last line off that a kill cut off, so that the next row starts on a line of its own.

    Args:
        file: The file; need not exist.

    Returns:
        Whether there was one.

    Raises:
        UsageError: As `read_rows`.
    """
    _, size = _whole_lines(file)
    if not file.exists() or file.stat().st_size == size:
        return False
    with file.open("r+b") as content:
        content.truncate(size)
        os.fsync(content.fileno())
    return True


def append_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append whole lines in one write, and see them onto the disk.

    Args:
        file: The file; it and its folder are made where needed.
        rows: One JSON object a line; NaN and infinity are refused by the writer.
    """
    text = "".join(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as content:
        content.write(text.encode())
        os.fsync(content.fileno())


def replace_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines anew: whole, or not at all."""
    draft = file.with_name(f".{file.name}.tmp")
    draft.unlink(missing_ok=True)
    append_rows(draft, rows)
    draft.replace(file)


def _whole_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file's whole lines, and how many bytes these take."""
    rows: list[dict[str, Any]] = []
    size = 0
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise UsageError(f"{file}, line {number}: not a JSON object: delete the file, or mend the line")
        else:
            break
        size += len(line)
    return rows, size
