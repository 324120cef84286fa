"""`moa evaluate --lm-eval`: tasks of the LM Evaluation Harness on a model with its adapter."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_peft.cli.table import print_table
from moa_peft.errors import UsageError, unknown
from moa_peft.json_lines import RESULTS_FILE

if TYPE_CHECKING:
    from moa_peft.evaluation.lm_eval import HarnessResult


def evaluate_on_harness(
    adapter: str | None,
    model: str | None,
    tasks: str,
    *,
    template: str | None,
    limit: int | None,
    batch_size: int,
    task_folder: Path | None,
    num_fewshot: int | None,
    out: Path | None,
    dtype: str | None,
    init_kwargs: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Load a model, run tasks of the harness on it, and print what they gave; the options are those of `evaluate`.

    Args:
        adapter: Adapter folder or name; None for the bare model.
        model: Base model; None for the adapter's own.
        tasks: Names with commas between.
        template: "chat" puts prompts through the chat template; None leaves them as the tasks write them.
        limit: Questions of each task.
        batch_size: Most requests in a forward pass.
        task_folder: A folder of more task files.
        num_fewshot: Worked examples before a question.
        out: Folder for the results.
        dtype: Of the base model.
        init_kwargs: How it is loaded, as `choose_base` takes them.
        as_json: Print one JSON object instead of a table.

    Raises:
        UsageError: If the harness is not installed, or a name or number is wrong.
    """
    from moa_peft.evaluation.lm_eval import HarnessOptions, check_harness_tasks, run_harness
    from moa_peft.evaluation.loading import load, read_adapter
    from moa_peft.evaluation.options import default_out
    from moa_peft.evaluation.result_key import identify_loaded
    from moa_peft.folder_lock import claimed
    from moa_peft.quiet import quiet_libraries

    if template not in (None, "chat"):
        known = ["chat"]
        raise UsageError(
            f"{unknown('template', template, known)}: with --lm-eval the tasks write the prompts, and chat puts them "
            "through the chat template"
        )
    found = None if adapter is None else read_adapter(adapter)
    out = out or default_out(model, found)
    options = HarnessOptions(
        tasks=tuple(one.strip() for one in tasks.split(",") if one.strip()),
        task_folder=task_folder,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        chat=template == "chat",
        out=out,
    )
    with quiet_libraries(), claimed(out):
        manager = check_harness_tasks(options)
        loaded = load(model, found, dtype=dtype, init_kwargs=init_kwargs)
        identity = identify_loaded(loaded)
        results = run_harness(loaded.model, loaded.tokenizer, options, identity=identity, manager=manager)
    if as_json:
        print(json.dumps(as_object(results, out)))
        return
    print_results(results, out)


def as_object(results: "list[HarnessResult]", out: Path) -> dict[str, Any]:
    """The results as one JSON object."""
    return {
        "results": [dataclasses.asdict(one.row) for one in results],
        "results_file": str(out / RESULTS_FILE),
        "examples_files": [str(one.examples_file) for one in results],
    }


def print_results(results: "list[HarnessResult]", out: Path) -> None:
    """Print one line a figure, with its standard error where the harness gives one."""
    first = results[0].row
    model = f"{first.base_model}, frozen" if first.adapter_fingerprint is None else (
        f"{first.base_model} with {first.adapter} ({first.method})"
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for one in results:
        for name, value in one.row.metrics.items():
            figure, _, way = name.partition(",")
            if value is None or figure.endswith("_stderr"):
                continue
            error = one.row.metrics.get(f"{figure}_stderr,{way}")
            shown = f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
            rows.append(
                (one.row.task, f"{one.row.n:,}", figure if way == "none" else f"{figure} ({way})", shown)
            )
    print_table(
        f"{model}, lm-eval {first.lm_eval_version}",
        ("task", "n", "figure", "value"),
        rows,
        left=("task", "figure"),
    )
    print(f"results   {out}/results.jsonl ({len(results)} row{'s' if len(results) > 1 else ''} added)")
