"""`moa import`: official checkpoints in."""

import dataclasses
import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from moa_peft.cli.overrides import ModelInitKwargs, parse_mapping

if TYPE_CHECKING:
    from moa_peft.official.importer import ImportReport


def import_(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="The official adapter.pth, or the transformers fork's safetensors: a file, or the folder that holds it.",
        ),
    ],
    base: Annotated[
        str,
        typer.Option(
            help='Base model it was trained on: folder, hub name or "smollm2". Its config is enough.'
        ),
    ],
    out: Annotated[Path, typer.Option(help="Adapter folder to write.")],
    alpha: Annotated[
        float | None,
        typer.Option(
            help="LoRA's alpha. The native code's weights do not tell it; the fork hard-codes 8 (rank 8)."
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts that a top-k router keeps. Official: 2.", show_default=False)
    ] = None,
    max_threshold: Annotated[
        float | None,
        typer.Option(
            help="Upper bound of a learned threshold (Sparse MoA). Official: 0.5; the fork hard-codes it."
        ),
    ] = None,
    constant_threshold: Annotated[
        float | None,
        typer.Option(
            help="The constant threshold, if it was trained with one: the weights cannot tell it from Soft MoA. Official: 0.5."
        ),
    ] = None,
    instance_level: Annotated[
        bool,
        typer.Option("--instance-level", help="The gates are those of the official instance-level code."),
    ] = False,
    model_init_kwargs: ModelInitKwargs = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the adapter in the folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Turn a checkpoint of the official code into an adapter of PEFT.

    Method, sizes and blocks are read from the weights; what they do not tell is asked for. The result computes what
    the official code computes, its oddities included: a Sparse MoA has a threshold that never learns and may switch
    every expert of a token off (ThresholdConfig gradient "none", at_least_one false), and gates of a whole instance are
    means over padding and answer as well.

    \b
    Examples:
      moa import adapter.pth --base models/Llama-3.1-8B-Instruct --alpha 8 --out adapters/soft
      moa import outputs/qwen3-8b-sparsemoa --base models/Qwen3-8B --out adapters/sparse
    """  # noqa: D301  # the backspace keeps the lines of the examples apart
    from moa_peft.official.conversion import OfficialSettings
    from moa_peft.official.importer import import_checkpoint
    from moa_peft.quiet import quiet_libraries

    settings = OfficialSettings(
        alpha=alpha,
        keep=top_k,
        max_threshold=max_threshold,
        constant_threshold=constant_threshold,
        instance_level=instance_level,
    )
    init_kwargs = parse_mapping("--model-init-kwargs", model_init_kwargs)
    with quiet_libraries():
        report = import_checkpoint(
            checkpoint, base, out, settings, init_kwargs=init_kwargs, overwrite=overwrite
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print_report(report)


def print_report(report: "ImportReport") -> None:
    """Say what was recognised and done, and what to type next."""
    from moa_peft.inspection.findings import ranges

    print(f"method      {report.method}, {report.layout} layout")
    print(f"parameters  {report.num_parameters:,} in {report.num_weights:,} weights, {report.dtype}")
    print(f"blocks      {ranges(report.blocks)} of 0-{report.num_blocks - 1}")
    rows = f"rows of B of {', '.join(report.permuted)} (rotary pairs to halves)"
    print(f"permuted    {rows if report.permuted else 'none'}")
    for name, value in report.defaults.items():
        print(f"assumed     {name} = {value:g}, hard-coded in the official fork")
    for doubt in report.doubts:
        print(f"assumed     {doubt}")
    if report.num_base_weights:
        print(f"left out    {report.num_base_weights:,} weights of the base model")
    if report.num_idle_weights:
        print(f"left out    {report.num_idle_weights:,} weights of routers in blocks without an expert")
    print(f"written     {report.adapter}")
    adapter = quote(str(report.adapter))
    print(f"next        moa evaluate --adapter {adapter} --tasks demo")
    print(f"            moa chat --adapter {adapter}")
