"""`moa train`: fine-tune a model with a mixture."""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from moa_peft.cli.overrides import key_lines, load_yaml, parse_flags
from moa_peft.training.recipe import TRAINER_DEFAULTS, Recipe, check_keys, merge

if TYPE_CHECKING:
    from moa_peft.training.prepare import Plan, TrainingOutcome

ANY_FIELD = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings that the command is registered with, so that any field works as a flag."""

EXAMPLES = """\b
Examples:
  moa train --data demo --output_dir runs/first
  moa train --config recipes/math.yaml --learning_rate 1e-4 --bf16 true
  moa train --config recipes/math.yaml --method sparse-moa --mixture.router.kind linear
  moa train --config recipes/math.yaml --resume"""


def train_help() -> str:
    """Write the help of the command; the keys and their meaning come from the recipe's own doc lines."""
    others = ", ".join(f"{name} {json.dumps(value)}" for name, value in TRAINER_DEFAULTS.items())
    return "\n\n".join(
        [
            "Fine-tune a model with a mixture of adapters.",
            "Settings come from a YAML file, from flags, or from both; a flag overrides the file.",
            EXAMPLES,
            "Keys of a recipe, each also a flag:",
            "\n".join(["\b", *key_lines(Recipe, leave_out=("trainer",))]),
            f"Every other field of trl.SFTConfig is a key too, but a few that are refused with the reason. Set here unless the recipe says otherwise: {others}.",
        ]
    )


def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file with the recipe.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the plan.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Fine-tune a model."""
    settings = load_yaml(config) if config is not None else {}
    from moa_peft.training.trainer_settings import switch_names, trainer_fields

    known = trainer_fields()
    flags = parse_flags(context.args, switch_names(), partial(check_keys, trainer_fields=known))
    recipe = Recipe.from_mapping(merge(settings, flags), known)

    from moa_peft.training.prepare import is_main, prepare
    from moa_peft.training.run import run

    stream = sys.stderr if as_json else sys.stdout
    say = partial(print, file=stream, flush=True) if is_main() else lambda _: None
    say(f"loading {recipe.model} and the rows of {recipe.data} ...")
    preparation = prepare(recipe)
    say(plan_text(preparation.plan))
    if dry_run:
        preparation.claim.close()
        if as_json and is_main():
            print(json.dumps(dataclasses.asdict(preparation.plan)))
        return
    try:
        outcome = run(preparation)
    except KeyboardInterrupt:
        say(f"\ninterrupted: {way_on(Path(preparation.plan.output_dir))}")
        raise
    say(outcome_text(outcome, recipe.data))
    if as_json and is_main():
        print(json.dumps(dataclasses.asdict(outcome)))


def way_on(folder: Path) -> str:
    """Say how to go on with a run that was interrupted."""
    from moa_peft.training.checkpoints import find_checkpoints

    whole = find_checkpoints(folder).complete
    if whole:
        return f"add --resume to go on from {whole[-1]}"
    return "no checkpoint was complete yet, so --resume starts over; --save_steps N writes one every N steps"


def plan_text(plan: "Plan") -> str:
    """Write what a run will do, for a person."""
    share = 100 * plan.trainable_parameters / plan.total_parameters
    held_out = ""
    if plan.validation_rows:
        held_out = f", {plan.validation_rows:,} held out{_left_out(plan.validation_rows_dropped)}"
    lines = [
        f"  model       {plan.model}",
        f"  method      {plan.method}: {plan.trainable_parameters:,} trainable parameters, {share:.2f} % of all",
        *(f"  experts     {one.text()}" for one in plan.placements),
        f"  data        {plan.rows_kept:,} rows{_left_out(plan.rows_dropped, plan.rows_cut)}{held_out}",
        f"  steps       {plan.steps:,}",
        f"  output_dir  {plan.output_dir}",
    ]
    if plan.skipped:
        lines.append(f"  skipped     {', '.join(plan.skipped)}: cut off while it was written, or deleted")
    if plan.resume_from is not None:
        lines.append(f"  resume      from {plan.resume_from}")
    elif plan.resumed:
        lines.append("  resume      from the start: no checkpoint was complete")
    return "\n".join(lines)


def _left_out(dropped: int, cut: int = 0) -> str:
    told = []
    if dropped:
        told.append(f"{dropped:,} dropped: their answers start after max_length")
    if cut:
        told.append(f"{cut:,} cut: their answers end after max_length")
    return f" ({'; '.join(told)})" if told else ""


def outcome_text(outcome: "TrainingOutcome", data: str) -> str:
    """Write what a run gave, where it lies and what to type next, for a person; ``data`` is what it was trained on."""
    loss = "none logged" if outcome.final_loss is None else f"{outcome.final_loss:.4f}"
    held_out = "" if outcome.validation_loss is None else f", held-out loss {outcome.validation_loss:.4f}"
    speed = "" if outcome.step_s is None else f", {outcome.step_s:.2f} s a step"
    folder = outcome.output_dir
    return "\n".join(
        [
            f"done: {outcome.steps:,} steps, last logged loss {loss}{held_out}{speed}",
            f"  adapter and model card  {folder}",
            f"  results                 {folder}/results.jsonl",
            f"  recipe                  {folder}/moa_recipe.json",
            "next:",
            f"  moa evaluate --adapter {quote(folder)}"
            + ("" if data == "demo" else " --tasks FILE_OF_TEST_ROWS"),
            f"  moa chat --adapter {quote(folder)}",
        ]
    )


train.__doc__ = train_help()
