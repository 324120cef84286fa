"""`moa evaluate`: accuracies and answer losses with their standard errors."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from moa_peft.cli.overrides import (
    Adapter,
    Dtype,
    Model,
    ModelInitKwargs,
    options_from_file,
    parse_mapping,
    refuse_given,
)
from moa_peft.cli.table import print_table

if TYPE_CHECKING:
    from moa_peft.evaluation.run import TaskResult


def evaluate(
    adapter: Adapter = None,
    model: Model = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help='With commas between: "demo", "commonsense", "math", "code", names of single tasks, files or folders '
            "of rows, names on the hub. Default: demo."
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="likelihood: the likeliest choice by its name; text: by its text, as lm-eval does; generation: the "
            "answer that is written. Default: likelihood where all questions have choices, else generation."
        ),
    ] = None,
    extraction: Annotated[
        str | None,
        typer.Option(
            help="Rule of the accuracy. generation: stated, official; likelihood: sum, per_token; "
            "text: sum, per_character."
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="paper or chat; not with mode text. Default: the one the adapter was trained with, else paper."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of the rows. Default: test, or validation where there is no test."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many rows of each task, from the start.")] = None,
    batch_size: Annotated[
        int, typer.Option(help="Most questions in a forward pass; no result depends on it.")
    ] = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of a generated answer. Default: 32 for a choice, 512 for a program, else 256."
        ),
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="Run the programs that the model writes, in a sandbox; the code tasks need it. Linux with bubblewrap only.",
        ),
    ] = False,
    data_root: Annotated[
        Path | None,
        typer.Option(
            help="Folder with a folder of rows for each named task. Without it they come from the hub."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.jsonl and the examples. "
            "Default: ADAPTER/evaluation, or moa_evaluation/MODEL for the bare model."
        ),
    ] = None,
    dtype: Dtype = None,
    model_init_kwargs: ModelInitKwargs = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            help="Tasks of the LM Evaluation Harness in the place of moa's own, with commas between. Needs the extra "
            "eval.",
        ),
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option(help="With --lm-eval: a folder of more task files.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="With --lm-eval: worked examples before a question. Default: as each task says."),
    ] = None,
    config: Annotated[  # noqa: ARG001  # its callback has put what it says into the other options
        Path | None,
        typer.Option(
            help="YAML file with any of these options; the command line overrides it.",
            callback=options_from_file,
            is_eager=True,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Evaluate a model, with or without an adapter, on held-out questions.

    A call that was interrupted goes on where it stopped; one that finds its results complete changes nothing.

    \b
    Examples:
      moa evaluate --adapter runs/first
      moa evaluate --tasks piqa,gsm8k --limit 100
      moa evaluate --tasks piqa,hellaswag,ARC-Easy --mode text --limit 500
      moa evaluate --adapter runs/first --tasks math --extraction official
      moa evaluate --adapter runs/first --tasks code --allow-code-execution
      moa evaluate --adapter runs/first --lm-eval arc_easy,openbookqa
    """  # noqa: D301  # the backspace keeps the lines of the examples apart
    init_kwargs = parse_mapping("--model-init-kwargs", model_init_kwargs)
    if lm_eval is not None:
        own = {"tasks": tasks, "mode": mode, "extraction": extraction, "split": split}
        own |= {"max-new-tokens": max_new_tokens, "data-root": data_root}
        own |= {"allow-code-execution": allow_code_execution or None}
        refuse_given(own, "has no meaning with --lm-eval, whose tasks say this themselves: leave it out")
        from moa_peft.cli.harness import evaluate_on_harness

        evaluate_on_harness(
            adapter, model, lm_eval, template=template, limit=limit, batch_size=batch_size, task_folder=lm_eval_path,
            num_fewshot=num_fewshot, out=out, dtype=dtype, init_kwargs=init_kwargs, as_json=as_json,
        )  # fmt: skip
        return
    refuse_given(
        {"lm-eval-path": lm_eval_path, "num-fewshot": num_fewshot},
        "has no meaning without --lm-eval TASKS: give both",
    )
    if mode == "text":
        refuse_given(
            {"template": template}, "has no meaning with --mode text, which has its own: leave it out"
        )
    from moa_peft.evaluation.loading import choose_template, load, read_adapter
    from moa_peft.evaluation.options import EvaluationOptions, default_out
    from moa_peft.evaluation.tasks import load_tasks

    found = None if adapter is None else read_adapter(adapter)
    out = out or default_out(model, found)
    options = EvaluationOptions(
        mode=cast("Any", mode),
        extraction=extraction,
        template=cast("Any", choose_template(template, found, "paper")),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        allow_code_execution=allow_code_execution,
        out=out,
    )
    chosen = load_tasks("demo" if tasks is None else tasks, data_root=data_root, split=split, limit=limit)
    for task in chosen:
        options.rule_for(options.mode_for(task))
        options.check_needs(task)

    from moa_peft.evaluation.result_key import identify_loaded
    from moa_peft.evaluation.run import evaluate as evaluate_task
    from moa_peft.folder_lock import claimed
    from moa_peft.quiet import quiet_libraries

    with quiet_libraries(), claimed(out):
        loaded = load(model, found, dtype=dtype, init_kwargs=init_kwargs)
        identity = identify_loaded(loaded)
        results = [
            evaluate_task(loaded.model, loaded.tokenizer, one, options, identity=identity) for one in chosen
        ]
    if as_json:
        print(json.dumps(as_object(results)))
        return
    print_results(results)
    print_places(results)


def as_object(results: "list[TaskResult]") -> dict[str, Any]:
    """The results as one JSON object."""
    return {
        "results": [dataclasses.asdict(one.row) for one in results],
        "reused": [one.row.task for one in results if one.reused],
        "results_file": str(results[0].results_file),
        "examples_files": [str(one.examples_file) for one in results],
    }


def print_results(results: "list[TaskResult]") -> None:
    """Print one line a task, with standard errors."""
    both = any(one.row.mode == "generation" for one in results)
    heads = ["task", "n", "accuracy %", *(["official %"] if both else []), "answer loss", "mode"]
    rows: list[tuple[str, ...]] = []
    for one in results:
        row = one.row
        scored = f"{row.n:,}" if row.num_scored in (0, row.n) else f"{row.n:,}, {row.num_scored:,} scored"
        rule = "" if row.extraction in ("sum", "stated") else f", {row.extraction}"
        official = _plus_minus(row.accuracies.get("official"), None, scale=100, digits=1)
        cells = (
            row.task,
            scored,
            _plus_minus(row.accuracy, row.standard_error, scale=100, digits=1),
            *([official] if both else []),
            _plus_minus(row.answer_loss, row.answer_loss_standard_error, scale=1, digits=4),
            f"{row.mode}{rule}",
        )
        rows.append(cells)
    print_table(_title(results[0]), heads, rows, left=("task", "mode"))


def print_places(results: "list[TaskResult]") -> None:
    """Say what was written and where, and what was there already."""
    new = [one for one in results if not one.reused]
    if new:
        print(f"results   {new[0].results_file} ({len(new)} row{'s' if len(new) > 1 else ''} added)")
        print(f"examples  {cast('Path', new[0].examples_file).parent}")
    old = [one.row.task for one in results if one.reused]
    if old:
        print(
            f"unchanged {', '.join(old)}: this evaluation was complete in {results[0].results_file}; give another --out "
            "to run it again"
        )
    for row in (one.row for one in results if one.row.num_scored == 0):
        has = "there is no accuracy" if row.answer_loss is None else "there is a loss but no accuracy"
        why = f"its rows state no answer, so {has}; a field answer gives one"
        if row.mode == "likelihood":
            why = f"its rows have no choices to compare, so {has}; --mode generation scores a field answer"
        print(f"note      {row.task}: {why}", file=sys.stderr)
    cut_off = [one.row for one in results if one.row.num_cut_off]
    for row in cut_off:
        print(
            f"warning   {row.task}: {row.num_cut_off:,} of {row.n:,} answers had not ended after {row.max_new_tokens} "
            "tokens; raise --max-new-tokens if they should",
            file=sys.stderr,
        )


def _title(result: "TaskResult") -> str:
    row = result.row
    if row.adapter_fingerprint is None:
        return f"{row.base_model}, frozen, template {row.template}"
    return f"{row.base_model} with {row.adapter} ({row.method}), template {row.template}"


def _plus_minus(value: float | None, error: float | None, *, scale: float, digits: int) -> str:
    if value is None:
        return "-"
    text = f"{scale * value:.{digits}f}"
    return text if error is None else f"{text} ± {scale * error:.{digits}f}"
