"""`moa bench`: speed and memory, in pairs."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from moa_peft.cli.overrides import refuse_given
from moa_peft.cli.table import print_table
from moa_peft.errors import UsageError, unknown

if TYPE_CHECKING:
    from moa_peft.bench.rows import BenchRow

DEFAULT_METHODS, SCALED_METHODS = "peft-lora-again,soft-moa-no-prompt,soft-moa,sparse-moa", "molora,adamole"


def bench(
    kind: Annotated[str, typer.Argument(help="train, decode, memory or scaling.")],
    methods: Annotated[
        str | None,
        typer.Option(
            help='Methods with commas between, or "all". The frozen model and the baseline are always added. '
            f"Default: {DEFAULT_METHODS}; for scaling {SCALED_METHODS}."
        ),
    ] = None,
    baseline: Annotated[str, typer.Option(help="What each method is compared with.")] = "peft-lora",
    model: Annotated[
        str,
        typer.Option(
            help="smollm2-135m or llama-3.1-8b (random weights), smollm2, a folder, or a name on the hub."
        ),
    ] = "smollm2-135m",
    layers: Annotated[int | None, typer.Option(help="Only so many decoder blocks of a shape.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 4,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a row; of the prompt, for decode. Default: 128, decode 64.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens decoded in each row, 64 by default; for decode.")
    ] = None,
    num_experts: Annotated[
        str | None,
        typer.Option(help="Copies of each expert to try, with commas between, 8,64 by default; for scaling."),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Timed rounds; each takes every method once.")] = 15,
    dtype: Annotated[
        str, typer.Option(help="Of the base: float32 or bfloat16; adapters are float32.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")] = False,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Time what torch.compile makes of each model, which takes it minutes; for train.",
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File of JSON lines to append the rows to.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Measure training steps, decoding, memory, or how cost grows with the number of experts.

    Methods are taken in turn in one process; what counts is the ratio, pair by pair: its median and quartiles.

    \b
    Examples:
      moa bench train
      moa bench decode --batch-size 1 --methods soft-moa,sparse-moa
      moa bench memory --dtype bfloat16 --out rows.jsonl
      moa bench scaling --methods molora,adamole --num-experts 8,64
    """  # noqa: D301  # the backspace keeps the lines of the examples apart
    from moa_peft.bench.measure import BenchOptions, as_dict, measure
    from moa_peft.bench.rows import Kind
    from moa_peft.bench.subjects import FROZEN, has_copies, method_names
    from moa_peft.json_lines import append_rows, read_rows
    from moa_peft.quiet import quiet_libraries

    if kind not in get_args(Kind):
        raise UsageError(unknown("kind of measurement", kind, get_args(Kind)))
    for own, one in (("decode", {"new-tokens": new_tokens}), ("scaling", {"num-experts": num_experts})):
        if kind != own:
            refuse_given(one, f"is for {own}, not for {kind}: leave it out")
    given = (SCALED_METHODS if kind == "scaling" else DEFAULT_METHODS) if methods is None else methods
    chosen = [one.strip() for one in given.split(",") if one.strip()]
    if methods == "all":
        chosen = [one for one in method_names() if (has_copies(one) if kind == "scaling" else one != FROZEN)]
    if out is not None:
        read_rows(out)  # a file of another kind is refused before anything is measured
    options = BenchOptions(
        kind=cast("Any", kind),
        methods=tuple(chosen),
        baseline=baseline,
        model=model,
        layers=layers,
        batch_size=batch_size,
        length=length if length is not None else 64 if kind == "decode" else 128,
        new_tokens=64 if new_tokens is None else new_tokens,
        num_experts=_numbers("8,64" if num_experts is None else num_experts) if kind == "scaling" else (),
        pairs=pairs,
        dtype=dtype,
        device=device,
        checkpointing=checkpointing,
        compiled=compiled,
    )
    from tqdm import tqdm

    with quiet_libraries(), tqdm(total=pairs + 1, desc=kind, unit="round", delay=2, file=sys.stderr) as bar:
        rows: list[BenchRow] = []
        for row in measure(options, on_turn=bar.update):
            rows.append(row)
            if out is not None:
                append_rows(out, [as_dict(row)])
    if as_json:
        print(json.dumps({"rows": [as_dict(row) for row in rows]}))
        return
    print_rows(rows)
    if out is not None:
        print(f"rows      {out} ({len(rows)} added)")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(",") if one.strip())
    except ValueError:
        raise UsageError(
            f"--num-experts is {text!r}: give whole numbers with commas between, as in 8,64"
        ) from None


def print_rows(rows: "list[BenchRow]") -> None:
    """Print one line a method."""
    from moa_peft.bench.measure import as_dict
    from moa_peft.bench.rows import tokens_per_second

    first = rows[0]
    title = f"{first.work}; {first.model}, {first.num_layers} blocks, {first.dtype}"
    title += f"; median (quartiles) of {first.pairs}" if first.pairs else ""
    columns = {
        "method": [
            row.method + ("" if row.num_experts is None else f", {row.num_experts} copies") for row in rows
        ],
        "parameters": [f"{row.trainable_parameters:,}" for row in rows],
        "ms": [f"{row.step_ms[1]:,.1f}" if row.pairs else "-" for row in rows],
        "tokens/s": [f"{speed:,.0f}" if (speed := tokens_per_second(as_dict(row))) else "-" for row in rows],
        f"over {first.baseline}": [_in_two_lines(row.over_baseline) for row in rows],
        "over frozen": [_in_two_lines(row.over_frozen) for row in rows],
        "saved MiB": ["-" if row.saved_mib is None else f"{row.saved_mib:,.1f}" for row in rows],
        "peak MiB": ["-" if row.peak_mib is None else f"{row.peak_mib:,.0f}" for row in rows],
        "of the device": ["-" if row.device_mib is None else f"{row.device_mib:,.0f}" for row in rows],
        "operators": [f"{row.operators:.0f}" if row.operators else "-" for row in rows],
        "no views": [f"{row.kernels:.0f}" if row.kernels else "-" for row in rows],
        "error": ["-" if row.max_abs_err is None else f"{row.max_abs_err:.0e}" for row in rows],
    }
    shown = {head: cells for head, cells in columns.items() if any(cell != "-" for cell in cells)}
    print_table(title, list(shown), list(zip(*shown.values(), strict=True)), left=("method",))
    for reason in dict.fromkeys(reason for row in rows for reason in row.objections()):
        print(f"not to be published: {reason}", file=sys.stderr)


def _in_two_lines(values: tuple[float, float, float] | None) -> str:
    return spread(values).replace(" ", "\n")


def spread(values: tuple[float, float, float] | None) -> str:
    """Write a median with its quartiles."""
    return "-" if values is None else f"{values[1]:.3f} ({values[0]:.3f}-{values[2]:.3f})"
