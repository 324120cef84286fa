"""One model on one task: resumable, and the same whatever the size of the batch."""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from moa_peft.errors import UsageError
from moa_peft.evaluation.batching import evaluating
from moa_peft.evaluation.options import RULES_OF, EvaluationOptions, Mode
from moa_peft.evaluation.question_runner import (
    Examiner,
    GenerationExaminer,
    LikelihoodExaminer,
    Record,
    TextExaminer,
)
from moa_peft.evaluation.questions import Task
from moa_peft.evaluation.result_key import ModelIdentity, describe, evaluation_key, identify
from moa_peft.evaluation.results import (
    ResultRow,
    file_name,
    mean_and_standard_error,
    proportion_standard_error,
)
from moa_peft.folder_lock import claimed
from moa_peft.json_lines import RESULTS_FILE, append_rows, read_rows, replace_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """What one model makes of one task."""

    row: ResultRow
    """The figures."""

    examples: tuple[Record, ...]
    """One record a question, in the order of the task."""

    examples_file: Path | None
    """Where the examples lie; None when everything stays in memory."""

    results_file: Path | None
    """Where the row lies; None likewise."""

    reused: bool
    """Whether an earlier call had finished the same evaluation, so that nothing was written."""

    def losses(self) -> list[float]:
        """The reference answers' losses, question by question, for `paired_difference`; those without one left out."""
        return [one["answer_loss"] for one in self.examples if one["answer_loss"] is not None]

    def correct(self) -> list[float]:
        """1.0 or 0.0 for each scored question by the headline rule, for `paired_difference`."""
        rule = self.row.extraction
        return [float(one["correct"][rule]) for one in self.examples if rule in one["correct"]]


def evaluate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    options: EvaluationOptions | None = None,
    *,
    identity: ModelIdentity | None = None,
) -> TaskResult:
    """Evaluate a model on a task.

    With ``options.out`` each batch is on the disk before the next begins, and a later call with the same model, rows
    and settings goes on from there; one that finds everything done changes nothing.

    Args:
        model: A causal language model of transformers, bare or in PEFT's wrapper. Its training mode is put back.
        tokenizer: The base model's.
        task: The task.
        options: How; None for the defaults.
        identity: Which model it is; None to find out from the model.

    Returns:
        The result.

    Raises:
        UsageError: If a question is too long for the model, a setting does not fit the task, it runs programs and
            may or can not, or another process works in ``options.out``.
        RunError: If a log-likelihood is not finite.
    """
    options = options or EvaluationOptions()
    with nullcontext() if options.out is None else claimed(options.out):
        return _evaluate(model, tokenizer, task, options, identity)


def _evaluate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    options: EvaluationOptions,
    identity: ModelIdentity | None,
) -> TaskResult:
    mode = options.mode_for(task)
    rule = options.rule_for(mode)
    options.check_needs(task)
    identity = identity or identify(model)
    key = evaluation_key(model, tokenizer, task, options, identity)
    file = (
        None
        if options.out is None
        else options.out / "examples" / f"{file_name(task.name)}-{mode}-{key[:12]}.jsonl"
    )
    done = _stored(file)
    resumed = len(done)
    start = time.perf_counter()
    if resumed < len(task.questions):
        with evaluating(model):
            _examine_rest(_examiner(model, tokenizer, task, options, mode), done, file, task, options)
    examples = tuple(done[place] for place in range(len(task.questions)))
    if file is not None and list(done) != list(range(len(examples))):
        replace_rows(file, examples)  # in the order of the task; so far they stand in that of the batches
    results = None if options.out is None else options.out / RESULTS_FILE
    named = {name: getattr(task, name) for name in ("source", "split", "limit")}
    wanted = {"key": key, "extraction": rule, "task": task.name, **named, **dataclasses.asdict(identity)}
    row = _stored_row(results, wanted)
    reused = row is not None
    if row is None:
        row = ResultRow(
            key=key,
            seconds=round(time.perf_counter() - start, 3),
            num_resumed=resumed,
            **describe(model, tokenizer, task, options, identity),
            **_figures(examples, mode, rule),
        )
        if results is not None:
            append_rows(results, [dataclasses.asdict(row)])
    return TaskResult(row=row, examples=examples, examples_file=file, results_file=results, reused=reused)


def _examiner(
    model: Any, tokenizer: "PreTrainedTokenizerBase", task: Task, options: EvaluationOptions, mode: Mode
) -> Examiner:
    if mode == "text":
        return TextExaminer(model, tokenizer, task, batch_size=options.batch_size)
    shared: dict[str, Any] = {"template": options.template, "batch_size": options.batch_size}
    if mode == "likelihood":
        return LikelihoodExaminer(model, tokenizer, task.questions, **shared)
    return GenerationExaminer(
        model, tokenizer, task.questions, max_new_tokens=options.tokens_for(task), **shared
    )


def _examine_rest(
    examiner: Examiner, done: dict[int, Record], file: Path | None, task: Task, options: EvaluationOptions
) -> None:
    """Run the batches that are not done. Batches stay whole, so a resumed run rounds as an uninterrupted one."""
    with tqdm(
        total=len(task.questions),
        initial=len(done),
        desc=task.name,
        unit="question",
        delay=2,
        file=sys.stderr,
        disable=not options.progress,
    ) as bar:
        for batch in examiner.batches():
            missing = [place for place in batch if place not in done]
            if not missing:
                continue
            new = {one["index"]: one for one in examiner.examine(batch)}
            if file is not None:
                append_rows(file, list(new.values()))
            done |= new
            bar.update(len(missing))


def _stored(file: Path | None) -> dict[int, Record]:
    """The examples that an earlier process has left, by index."""
    if file is None:
        return {}
    rows = read_rows(file)
    for number, one in enumerate(rows, start=1):
        if not isinstance(one.get("index"), int):
            raise UsageError(f"{file}, line {number}: it has no index: delete the file, or mend the line")
    return {one["index"]: one for one in rows}


def _stored_row(results: Path | None, wanted: Mapping[str, Any]) -> ResultRow | None:
    """The row of the same evaluation by the same rule and under the same names, if there is one."""
    names = {one.name for one in dataclasses.fields(ResultRow)}
    for row in read_rows(results) if results is not None else []:
        if row.keys() == names and all(row[name] == value for name, value in wanted.items()):
            return ResultRow(**row)
    return None


def _figures(examples: Sequence[Record], mode: Mode, rule: str) -> dict[str, Any]:
    """The figures of a task from its examples."""
    scored = [one for one in examples if one["correct"]]
    accuracies: dict[str, float | None] = {
        name: sum(one["correct"][name] for one in scored) / len(scored) if scored else None
        for name in RULES_OF[mode]
    }
    share = accuracies[rule]
    losses = [one["answer_loss"] for one in examples if one["answer_loss"] is not None]
    loss, loss_error = mean_and_standard_error(losses) if losses else (None, None)
    cut_off = sum(one["stopped"] == "length" for one in examples) if mode == "generation" else None
    return {
        "n": len(examples),
        "num_scored": len(scored),
        "accuracy": share,
        "standard_error": None if share is None else proportion_standard_error(share, len(scored)),
        "accuracies": accuracies,
        "answer_loss": loss,
        "answer_loss_standard_error": loss_error,
        "mode": mode,
        "extraction": rule,
        "num_cut_off": cut_off,
    }
