"""`moa demo`: the main job, end to end, on what the packages bring."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from moa_peft.training.recipe import DEFAULT_METHOD

if TYPE_CHECKING:
    from moa_peft.study.demo import DemoResult


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; a finished one there is left alone.")] = Path(
        "runs/demo"
    ),
    method: Annotated[
        str, typer.Option(help="Method of the family; `moa methods` lists them.")
    ] = DEFAULT_METHOD,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of eight sentences each.")] = 36,
    questions: Annotated[
        int | None, typer.Option(min=2, help="Held-out sentences to compare on. Default: all 200.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the report.")
    ] = False,
) -> None:
    """Fine-tune the embedded model on film reviews and compare it with the frozen one.

    Takes about 5 minutes on two cores after the first run's downloads (the model 93 MB, the reviews 145 MB).

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
        print(report(result, "moa" if shutil.which("moa") else sys.argv[0]))


def report(result: "DemoResult", moa: str) -> str:
    """Write frozen against tuned, three sentences with both answers, and what to type next.

    Args:
        result: The comparison.
        moa: The command as the user can type it.

    Returns:
        Lines for a person.
    """
    frozen, tuned, training = result.frozen.row, result.tuned.row, result.training
    assert frozen.accuracy is not None, "every question of the demo has choices"
    assert tuned.accuracy is not None, "every question of the demo has choices"
    gain, error = 100 * result.accuracy_gain, 100 * result.accuracy_gain_error
    lines = [
        f"\nThe sentiment of {frozen.n} held-out sentences of film reviews (SST-2):",
        f"  frozen    {100 * frozen.accuracy:5.1f} % right",
        f"  tuned     {100 * tuned.accuracy:5.1f} % right",
        f"  gain      {gain:+5.1f} points, standard error {error:.1f} (paired by sentence)",
    ]
    if gain <= 2 * error:
        lines.append("  Not above two standard errors: give more --steps, or leave --questions out.")
    lines.append("\nThree sentences, those whose answers changed first:")
    lines += [
        f"  {one.sentence}\n      frozen: {one.frozen}, tuned: {one.tuned}, right: {one.label}"
        for one in result.examples
    ]
    share = 100 * training.trainable_parameters / training.total_parameters
    step = "" if training.step_s is None else f", {training.step_s:.2f} s a step"
    folder = training.output_dir
    lines += [
        f"\ntrained     {training.trainable_parameters:,} parameters ({share:.2f} % of the model)",
        f"time        {result.seconds:.0f} s: frozen {frozen.seconds:.0f} s, training {training.train_s:.0f} s{step}, tuned {tuned.seconds:.0f} s",
        f"adapter     {folder}",
        f"model card  {folder}/README.md",
        f"results     {folder}/results.jsonl",
        "\nNext:",
        f"  {moa} inspect --adapter {quote(folder)} --data demo --limit 20 --out report.html",
        f"  {moa} chat --adapter {quote(folder)}",
        "      > Please choose the sentiment of this movie review: a joy from start to finish",
        "      > /base, and the same again: the frozen model's answer",
        f"  {moa} train --data YOUR.jsonl --output_dir runs/mine",
    ]
    return "\n".join(lines)
