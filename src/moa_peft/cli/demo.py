"""`moa demo`: the main job, end to end, on what the packages bring."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moa_peft.study.demo import DemoResult


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; a finished one there is left alone.")] = Path(
        "runs/demo"
    ),
    method: Annotated[str, typer.Option(help="Method of the family; `moa methods` lists them.")] = "soft-moa",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of eight questions each.")] = 40,
    questions: Annotated[
        int | None, typer.Option(min=2, help="Held-out questions to compare on. Default: all 200.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the report.")
    ] = False,
) -> None:
    """Fine-tune the embedded model on real questions and compare it with the frozen one.

    Takes some minutes on two cores after the first run's downloads (the model 98 MB, the questions 145 MB).

    Example: moa demo --method sparse-moa --steps 100
    """
    from moa_peft.cli.train import plan_text
    from moa_peft.quiet import quiet_libraries
    from moa_peft.study.demo import run_demo

    def tell(line: str) -> None:
        print(f"\n{line}", file=sys.stderr, flush=True)

    with quiet_libraries():
        result = run_demo(out, method, steps, tell, lambda plan: tell(plan_text(plan)), questions)
    if as_json:
        print(json.dumps(dataclasses.asdict(result), default=str))
    else:
        print_report(result)


def print_report(result: "DemoResult") -> None:
    """Print frozen against tuned, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    frozen, tuned, training = result.frozen.row, result.tuned.row, result.training
    table = Table(title=f"{frozen.n} held-out questions of ARC-Easy and OpenBookQA", title_justify="left")
    for name in ("", "frozen", "tuned", "gain, paired"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(
        "answer loss, nats a token",
        f"{frozen.answer_loss:.3f} ± {frozen.answer_loss_standard_error:.3f}",
        f"{tuned.answer_loss:.3f} ± {tuned.answer_loss_standard_error:.3f}",
        f"{result.loss_gain:+.3f} ± {result.loss_gain_error:.3f}",
    )
    assert frozen.accuracy is not None, "every question of the demo has choices"
    assert tuned.accuracy is not None, "every question of the demo has choices"
    table.add_row(
        "accuracy, %",
        f"{100 * frozen.accuracy:.1f} ± {100 * (frozen.standard_error or 0):.1f}",
        f"{100 * tuned.accuracy:.1f} ± {100 * (tuned.standard_error or 0):.1f}",
        f"{100 * result.accuracy_gain:+.1f} ± {100 * result.accuracy_gain_error:.1f}",
    )
    Console().print(table)
    print("± is one standard error. Accuracy: the likeliest of the choices.")
    if abs(result.accuracy_gain) <= 2 * result.accuracy_gain_error:
        print(
            "The accuracy is the same within two standard errors: so few steps teach a model this small the form of an "
            "answer, not what is true."
        )
    share = 100 * training.trainable_parameters / training.total_parameters
    print(f"trained     {training.trainable_parameters:,} parameters ({share:.2f} % of the model)")
    if training.step_s is not None:
        print(f"speed       {training.step_s:.2f} s a step")
    folder, moa = training.output_dir, "moa" if shutil.which("moa") else sys.argv[0]
    print(f"adapter     {folder}")
    print(f"model card  {folder}/README.md")
    print(f"results     {folder}/results.jsonl")
    print("\nNext:")
    print(f"  {moa} chat --adapter {folder}")
    print(f"  {moa} evaluate --adapter {folder} --tasks demo --mode generation --limit 20")
    print(f"  {moa} train --data YOUR.jsonl --output_dir runs/mine")
