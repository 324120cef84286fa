"""`moa compare`: a study of methods, seeds and tasks."""

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moa_peft.cli.overrides import key_lines, load_yaml, parse_flags
from moa_peft.errors import UsageError
from moa_peft.extras import EXTRAS, check_installed, install_hint, is_installed
from moa_peft.study.config import Method, StudyConfig, studies_of

if TYPE_CHECKING:
    from moa_peft.study.runner import Study
    from moa_peft.study.statistics import MethodSummary, StudySummary

EXAMPLES = """\b
Examples:
  moa compare --config studies/demo.yaml --dry-run
  moa compare --config studies/demo.yaml
  moa compare --config studies/demo.yaml --train_limit 200 --out runs/larger
  moa compare --config studies/demo.yaml --ray --cpus-per-run 2
  moa compare --config studies/cpu.yaml --domain math --report-only"""


def compare_help() -> str:
    """Write the help of the command; the keys and their meaning come from the config's own doc lines."""
    return "\n\n".join(
        [
            "Compare methods on one base model: train, choose learning rates on validation rows, evaluate, report.",
            "The same call goes on where it was cut off, and does nothing twice.",
            "Settings come from a YAML file, from flags, or from both; a flag overrides the file.",
            EXAMPLES,
            "Keys of a study, each also a flag:",
            "\n".join(["\b", *key_lines(StudyConfig)]),
            "Keys of an entry of methods:",
            "\n".join(["\b", *key_lines(Method, dashes="")]),
        ]
    )


def compare(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file with the study.")] = None,
    domain: Annotated[
        str | None,
        typer.Option(help="Only this one of the study's domains; all of them, one by one, without."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan.")] = False,
    use_ray: Annotated[
        bool, typer.Option("--ray", help="Do runs in parallel processes through Ray (extra: ray).")
    ] = False,
    cpus_per_run: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processors of a run with --ray, 1 by default; beside them a GPU where there is one."
        ),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do runs again that failed.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Only rewrite the report, from the rows.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a study.")] = False,
) -> None:
    """Compare methods."""
    if cpus_per_run is not None and not use_ray:
        raise UsageError("--cpus-per-run is for --ray: add it, or leave it out")
    if dry_run and report_only:
        raise UsageError("--dry-run and --report-only do nothing together: give one")
    settings = load_yaml(config) if config is not None else {}
    say = partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)

    from moa_peft.study.report import read_summary, write_report

    # a machine that computes needs no plots
    has_report = report_only or all(map(is_installed, EXTRAS["report"]))
    has_failed = False
    if use_ray:
        check_installed("ray")
    configs = studies_of(settings, parse_flags(context.args), domain)
    # what is wrong with the last is told before the first has run
    studies = [None if report_only else check(one, say) for one in configs]
    for study_config, study in zip(configs, studies, strict=True):
        if study is not None:
            how = {"dry_run": dry_run, "retry_failed": retry_failed, "as_json": as_json}
            run_all(study, say, ray_cpus=(cpus_per_run or 1) if use_ray else None, **how)
        if dry_run:
            continue
        summary = write_report(study_config) if has_report else read_summary(study_config)
        say(outcome_text(summary, has_report=has_report))
        if as_json:
            print(json.dumps(as_object(summary), default=dataclasses.asdict))
        # a learning rate that failed is discarded; it counts where none is left
        has_failed |= any(
            one.stage == "final" or summary.chosen[one.label] is None for one in summary.failures
        )
    if has_failed:
        raise typer.Exit(1)


def check(config: StudyConfig, say: Callable[[str], None]) -> "Study":
    """Check a study before its first run."""
    from moa_peft.study.runner import open_study

    say(f"checking {len(config.methods)} methods and the rows of {config.data} ...")
    return open_study(config)


def run_all(
    study: "Study",
    say: Callable[[str], None],
    *,
    dry_run: bool,
    retry_failed: bool,
    as_json: bool,
    ray_cpus: int | None = None,
) -> None:
    """Say what a study will do, and do it; through Ray where its processors for a run are given."""
    from moa_peft.study.rows import read_results
    from moa_peft.study.runner import planned, run_study

    left = planned(study, read_results(study.folder), retry_failed=retry_failed)
    say(plan_text(study, left))
    if dry_run:
        if as_json:
            print(json.dumps({"out": study.config.out, **left}))
        return
    try:
        if ray_cpus is None:
            run_study(study, say=say, retry_failed=retry_failed)
            return
        from moa_peft.study.ray_pool import ray_pool

        with ray_pool(cpus=ray_cpus) as (pool, at_once):
            say(f"  at once     {at_once}")
            run_study(study, pool=pool, say=say, progress=False, retry_failed=retry_failed)
    except KeyboardInterrupt:
        say("\ninterrupted: the same call goes on from here")
        raise


def outcome_text(summary: "StudySummary", *, has_report: bool) -> str:
    """Write what a study has found and where it lies, for a person."""
    from moa_peft.study.formatting import nats, percent, run_name
    from moa_peft.study.schedule import rate_text

    folder = Path(summary.config.out)
    by_loss = not any(one.mean for one in summary.methods)
    what = (
        "loss of the answers, nats a token" if by_loss else f"mean accuracy over {', '.join(summary.scored)}"
    )
    lines = [f"{what}, ± standard error over seeds, of the frozen model over questions:"]
    lines += [
        f"  {one.label}: " + (_losses(one) if by_loss else f"{percent(one.mean)} %")
        for one in summary.methods
    ]
    if not summary.methods:
        lines = ["learning rates chosen, and the loss of the validation answers, nats a token:"]
        lines += [
            f"  {label}: {rate_text(one.rate)}, {nats(one.loss)}" for label, one in summary.choices.items()
        ]
    lines += [f"failed    {run_name(row)}: {row.failure}" for row in summary.failures]
    lines += [f"missing   {one}" for one in summary.missing]
    report = f"report    {folder / 'report.md'}, {folder / 'report.html'}"
    lines.append(report if has_report else f"no report: {install_hint('report')}")
    lines.append(f"rows      {folder / 'results.jsonl'}")
    return "\n".join(lines)


def _losses(method: "MethodSummary") -> str:
    from moa_peft.study.formatting import NONE, nats

    return ", ".join(f"{name} {nats(loss)}" for name, loss in method.losses.items()) or NONE


def as_object(summary: "StudySummary") -> dict[str, Any]:
    """What a study has found, as one JSON object; estimates and differences are dataclasses still."""
    from moa_peft.study.formatting import run_name

    return {
        "out": summary.config.out,
        "rows": len(summary.rows),
        "chosen": dict(summary.chosen),
        "accuracy": {one.label: one.mean for one in summary.methods},
        "losses": {one.label: dict(one.losses) for one in summary.methods},
        "forgetting": {
            one.label: one.forgetting_mean for one in summary.methods if one.forgetting_mean is not None
        },
        "versus_baseline": {one.label: one.versus for one in summary.methods if one.versus is not None},
        "versus_baseline_by_test": {
            one.label: one.versus_by_test for one in summary.methods if one.versus_by_test
        },
        "losses_versus_baseline": {
            one.label: one.losses_versus for one in summary.methods if one.losses_versus
        },
        "forgetting_versus_baseline": {
            one.label: one.forgetting_versus for one in summary.methods if one.forgetting_versus is not None
        },
        "failures": [f"{run_name(row)}: {row.failure}" for row in summary.failures],
        "missing": list(summary.missing),
    }


def plan_text(study: "Study", left: dict[str, int]) -> str:
    """Write what a study will do, for a person."""
    from moa_peft.study.schedule import rate_text

    config, data = study.config, study.data
    rates = ", ".join(map(rate_text, config.learning_rates))
    tuning_seeds = ", ".join(map(str, config.tuning_seeds))
    chosen = f"tried on seed {tuning_seeds}, chosen by {config.choose_by}"
    if not config.has_tuning:
        chosen = "the only one"
    elif (config.most_rates or 0) > len(config.learning_rates):
        chosen = f"up to {config.most_rates} a method, {chosen}"
    tuning = (
        f" ({data.short.rows:,} while rates are tried)" if config.has_tuning and config.short_rows else ""
    )
    questions = sum(len(one.questions) for one in data.tests)
    forgetting = ", ".join(f"{one.name} ({len(one.questions):,})" for one in data.forgetting)
    trainer = config.trainer_of(config.methods[0])
    steps = trainer.get("max_steps", -1)
    length = f"{steps:,} steps" if steps > 0 else f"epochs {trainer['num_train_epochs']:g}"
    lines = [
        f"  methods     {', '.join(config.labels())}, and the frozen model; baseline {config.baseline}",
        f"  rates       {rates}, {chosen}",
        f"  seeds       {', '.join(map(str, config.seeds))}",
        f"  training    {data.train.rows:,} rows{tuning}, {length}",
        f"  validation  {len(data.validation.questions):,} rows",
        f"  tests       {len(data.tests)}, {questions:,} questions in all",
        f"  left        {left['train']} runs to train, {left['score']} more to score only",
        *([f"  forgetting  {forgetting}"] if forgetting else []),
        f"  out         {config.out}",
    ]
    return "\n".join(lines)


compare.__doc__ = compare_help()
