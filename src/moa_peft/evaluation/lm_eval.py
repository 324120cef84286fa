"""Tasks of the LM Evaluation Harness on a model that is loaded here, with or without an adapter."""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from moa_peft.errors import RunError, UsageError, unknown
from moa_peft.evaluation.result_key import ModelIdentity
from moa_peft.evaluation.results import file_name
from moa_peft.extras import require
from moa_peft.json_lines import RESULTS_FILE, append_rows, replace_rows
from moa_peft.mixture.token_watch import prompt_lengths
from moa_peft.provenance import provenance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessOptions:
    """Which tasks of the harness are run, and how."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags, as the harness knows them; `*` stands for any letters."""
    task_folder: Path | None = None
    """A folder of more task files; None for the harness's own alone."""
    limit: int | None = None
    """Only so many questions of each task, from the start; None for all."""
    num_fewshot: int | None = None
    """Worked examples before each question; None for what each task says."""
    batch_size: int = 16
    """Most requests in a forward pass; one where gates are of whole instances."""
    chat: bool = False
    """Whether prompts are put through the tokenizer's chat template."""
    out: Path | None = None
    """Folder for results.jsonl and the examples; None keeps everything in memory."""

    def __post_init__(self) -> None:
        least = {"limit": 1, "num_fewshot": 0, "batch_size": 1}
        problems = [
            f"{name} is {number}: give at least {low}"
            for name, low in least.items()
            if (number := getattr(self, name)) is not None and number < low
        ]
        if not self.tasks:
            problems.append("lm_eval is empty: give names of tasks with commas between")
        if self.task_folder is not None and not self.task_folder.is_dir():
            problems.append(f"lm_eval_path {self.task_folder} is no folder: give a folder of task files")
        if problems:
            raise UsageError("; ".join(problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessRow:
    """What the harness found on one task, with what is needed to repeat it; what has no line here is as in `ResultRow`."""

    kind: Literal["lm-eval"] = "lm-eval"
    """What the row is of."""
    task: str
    """The task's name in the harness."""
    task_version: str
    """The version that the task gives itself."""
    n: int
    """Questions."""
    metrics: Mapping[str, float | None]
    """The harness's figures by "metric,filter"; those with "_stderr" are standard errors, None where it has none."""
    task_config: str
    """The whole configuration of the task, as JSON."""
    limit: int | None
    """Questions taken from the start; None for all."""
    num_fewshot: int | None
    """Worked examples before each question."""
    chat: bool
    """Whether prompts went through the chat template."""
    batch_size: int
    dtype: str
    base_model: str
    base_settings: Mapping[str, Any]
    base_fingerprint: str
    adapter: str | None
    adapter_fingerprint: str | None
    method: str
    seed: int | None
    seconds: float
    """Time taken by all tasks of the call together, loading not included."""
    lm_eval_version: str
    """Of the harness."""
    versions: Mapping[str, str | None]
    commit: str | None
    dirty: bool | None
    command: str
    device: str
    threads: int
    taken_at: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessResult:
    """What one call of the harness found on one task."""

    row: HarnessRow

    samples: tuple[dict[str, Any], ...]
    """The harness's own record of each question."""
    examples_file: Path | None
    """Where these lie; None when everything stays in memory."""


def check_harness_tasks(options: HarnessOptions) -> Any:
    """Find the tasks before a model is loaded.

    Returns:
        The harness's task manager; without its own tasks where the folder holds all, as reading those takes seconds.

    Raises:
        UsageError: If the harness is not installed, or a name stands for no task.
    """
    make = require("lm_eval.tasks", "--lm-eval").TaskManager
    if options.task_folder is not None:
        manager = make(include_path=str(options.task_folder), include_defaults=False)
        if all(manager.match_tasks([name]) for name in options.tasks):
            return manager
    manager = make(include_path=None if options.task_folder is None else str(options.task_folder))
    for name in options.tasks:
        if not manager.match_tasks([name]):
            # without the list of those that are known: they are over 10,000
            problem, _, _ = unknown("task of lm-eval", name, manager.all_tasks).partition("known: ")
            raise UsageError(f"{problem.strip().rstrip(':')}; lm_eval ls tasks lists them")
    return manager


def run_harness(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    options: HarnessOptions,
    *,
    identity: ModelIdentity,
    manager: Any = None,
) -> list[HarnessResult]:
    """Run tasks of the harness on a model, and keep a row of each.

    Args:
        model: A causal language model of transformers, bare or in PEFT's wrapper, in evaluation mode.
        tokenizer: The base model's.
        options: Which tasks, and how.
        identity: Which model it is.
        manager: What `check_harness_tasks` gave for these options; None to call it.

    Returns:
        One result a task; a group gives its tasks.

    Raises:
        UsageError: As `check_harness_tasks`; also if a task cannot be prepared, as its data cannot be had.
        RunError: If the harness gives no result.
    """
    manager = manager or check_harness_tasks(options)
    wrapper, batch_size = require("lm_eval.models.huggingface", "--lm-eval").HFLM, options.batch_size
    if prompt_lengths(model, [1]):
        wrapper, batch_size = _telling_prompts(wrapper), 1
    start = time.perf_counter()
    try:
        found = require("lm_eval", "--lm-eval").simple_evaluate(
            wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(manager.match_tasks(list(options.tasks))),
            task_manager=manager,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            apply_chat_template=options.chat,
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"lm-eval: {' '.join(str(error).split())[:300] or type(error).__name__}") from error
    if not found or not found.get("samples"):
        raise RunError(f"lm-eval gave no result for {', '.join(options.tasks)}")
    shared = {
        "limit": options.limit,
        "chat": options.chat,
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": round(time.perf_counter() - start, 3),
        "lm_eval_version": str(found["lm_eval_version"]),
        **dataclasses.asdict(identity),
        **provenance(),
    }
    results = [_result(name, found, shared, options.out) for name in found["samples"]]
    if options.out is not None:
        file = options.out / RESULTS_FILE
        append_rows(file, [dataclasses.asdict(one.row) for one in results])
    return results


def _telling_prompts(wrapper: type[Any]) -> type[Any]:
    """The harness's model for gates of whole instances: each call is one request, and says how long its prompt is.

    The harness pads on the right without a mask, and the model cannot see where the reply begins.
    """

    class TellingPrompts(wrapper):
        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self._lengths: dict[tuple[int, ...], int] = {}
            for _, prompt, reply in requests:
                read = (*prompt, *reply)[-(self.max_length + 1) :][:-1]
                self._lengths[read] = len(read) - len(reply) + 1
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002  # of other models
            length = self._lengths[tuple(inps[0].tolist())]
            with torch.no_grad():
                return self.model(inps, **prompt_lengths(self.model, [length])).logits

    return TellingPrompts


def _result(
    name: str, found: Mapping[str, Any], shared: Mapping[str, Any], out: Path | None
) -> HarnessResult:
    samples = tuple(_finite_json(one) for one in found["samples"][name])
    figures = {name: value for name, value in found["results"][name].items() if "," in name}
    row = HarnessRow(
        task=name,
        task_version=str(found["versions"].get(name)),
        n=len({one.get("doc_id", place) for place, one in enumerate(samples)}),
        # what the harness cannot give ("N/A", nan) is None
        metrics={
            key: float(one) if isinstance(one, int | float) and math.isfinite(one) else None
            for key, one in figures.items()
        },
        task_config=json.dumps(_finite_json(found["configs"].get(name)), sort_keys=True),
        num_fewshot=found["n-shot"].get(name),
        **shared,
    )
    file = None
    if out is not None:
        weights = f"{row.base_fingerprint}{row.adapter_fingerprint}{row.task_config}{row.limit}{row.chat}{row.num_fewshot}"
        key = hashlib.sha256(weights.encode()).hexdigest()[:12]
        file = out / "examples" / f"{file_name(name)}-lm-eval-{key}.jsonl"
        replace_rows(file, samples)
    return HarnessResult(row=row, samples=samples, examples_file=file)


def _finite_json(value: Any) -> Any:
    """The same as JSON can hold it: what is not finite is null, what JSON does not know is its text."""
    if isinstance(value, Mapping):
        return {str(name): _finite_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_json(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
