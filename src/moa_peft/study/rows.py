"""A row of a study's results: one for each learning rate that was tried and for each finished run."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from moa_peft.errors import UsageError
from moa_peft.json_lines import RESULTS_FILE, read_rows
from moa_peft.study.data import RowSet

Stage = Literal["tuning", "final"]


ROUTER_FIGURES = {
    "active_experts": "active experts",
    "load_variation": "load variation",
    "mean_cka": "mean CKA",
    "gate_deviation": "gate deviation",
}
"""Figures of a router and what the report calls them; older rows lack the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What a model made of a set of questions."""

    n: int
    """Questions."""
    md5: str
    """MD5 of the rows used, their contents and order."""
    file_md5: str | None
    """MD5 of the whole file of rows, unzipped."""
    mode: str
    """Whether choices were compared by likelihood or answers were generated."""
    extraction: str
    """The rule behind the accuracy."""
    accuracy: float | None
    """Share of the scored questions answered rightly, 0..1."""
    standard_error: float | None
    """Of that share, from the number of questions."""
    answer_loss: float | None
    """Mean loss of the reference answers, nats a token."""
    answer_loss_standard_error: float | None
    """Of that mean."""
    correct: str
    """A 1 for each scored question answered rightly, a 0 for each other, in the order of the questions."""
    losses: Sequence[float] = ()
    """The reference answers' losses, nats a token, to six digits, question by question; none in older rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """The time of an optimiser step: forward, backward, update; without evaluation, logging and saving."""

    lower: float
    """First quartile, milliseconds."""
    median: float
    """Median, milliseconds."""
    upper: float
    """Third quartile, milliseconds."""
    steps: int
    """Steps that were timed; the first, which warms up, is not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRow:
    """One run, or one learning rate tried, with what is needed to repeat it."""

    kind: Literal["compare"] = "compare"
    """What the row is of."""
    stage: Stage
    """ "tuning" for a learning rate that was tried, scored on validation rows alone; "final" for a run with its tests."""
    label: str
    """The method's label in the study; "frozen" for the base model alone."""
    learning_rate: float | None
    """The learning rate; None for the base model."""
    seed: int | None
    """Seed of the initial weights, the order of the rows and dropout; None for the base model."""
    config_hash: str
    """Hash of all that decides the run: model, rows, template, trainer, method, learning rate and seed."""
    failure: str | None
    """Why the run failed; the fields that it did not come to are then None. None for a run that ended well."""
    method: str
    """The preset that the method starts from."""
    mixture: Mapping[str, Any]
    """The study's changes to it."""
    method_config: Mapping[str, Any]
    """Experts and router that this made, with every field."""
    trainer: Mapping[str, Any]
    """The fields of `trl.SFTConfig` that were set."""
    model: str
    """The base model, as it was named."""
    base_settings: Mapping[str, Any] | None = None
    """How it was loaded for scoring; none in older rows."""
    base_fingerprint: str | None
    """Hash of its weights."""
    adapter_fingerprint: str | None
    """Hash of the trained weights."""
    template: str
    """How a row becomes text."""
    max_length: int
    """Tokens kept of a training example."""
    draw_seed: int
    """Seed that the validation and test rows were drawn with."""
    train: RowSet
    """The training rows."""
    rows_dropped: int | None
    """Training rows left out, because max_length would cut their answers away."""
    trainable_parameters: int | None
    """Numbers trained."""
    total_parameters: int | None
    """Numbers in all, the frozen model's included."""
    steps: int | None
    """Optimiser steps."""
    final_loss: float | None
    """The training loss last logged, nats a token of the answers."""
    step_ms: StepTime | None
    """Time of an optimiser step, of the process that trained last."""
    peak_mem_mib: float | None
    """Most memory held while training, 2**20 bytes: on a GPU what torch allocated, else the whole process; of the
    process that trained last. None where the system does not tell."""
    train_s: float | None
    """Seconds of training, of the process that trained last."""
    evaluate_s: float | None
    """Seconds of validation and tests, of the process that wrote the row."""
    validation: Scores | None
    """The validation rows, which alone choose the learning rate."""
    tests: Mapping[str, Scores]
    """The tests by name; empty in stage "tuning". A later row of the same run may add tests."""
    router: Mapping[str, float | None] | None
    """Figures of the router on validation prompts; None without a router."""
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

    def failed(self, tests: Sequence[str]) -> bool:
        """Whether the run has a failure and lacks one of these tests, or has none at all."""
        return self.failure is not None and not (self.tests and all(name in self.tests for name in tests))

    @property
    def weights(self) -> tuple[str | None, str | None]:
        """Hashes of the weights of the base model and of the adapter."""
        return self.base_fingerprint, self.adapter_fingerprint

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Read a row back."""
        nested: dict[str, Any] = {"train": RowSet(**values["train"])}
        for name, kind in (("step_ms", StepTime), ("validation", Scores)):
            nested[name] = None if values[name] is None else kind(**values[name])
        nested["tests"] = {name: Scores(**one) for name, one in values["tests"].items()}
        return cls(**{**values, **nested})


def read_results(folder: Path) -> list[RunRow]:
    """Read the rows in a study's folder, one for each run and stage, in the order of their first rows.

    A later row of a run takes the place of an earlier one, and keeps its tests where they are of the same weights; a
    rerun that failed keeps the earlier row's figures and adds its failure.

    Raises:
        UsageError: If the file holds something else.
    """
    found: dict[tuple[str, str], RunRow] = {}
    for number, values in enumerate(read_rows(folder / RESULTS_FILE), start=1):
        try:
            row = RunRow.from_mapping(values)
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{folder / RESULTS_FILE}, line {number} is no row of a study that this version writes ({error}): "
                "give another out"
            ) from error
        key = (row.stage, row.config_hash)
        before = found.get(key)
        if before is not None and before.validation is not None:
            if row.failure is not None:
                row = dataclasses.replace(before, failure=row.failure)
            elif row.weights == before.weights:
                row = dataclasses.replace(row, tests={**before.tests, **row.tests})
        found[key] = row
    return list(found.values())
