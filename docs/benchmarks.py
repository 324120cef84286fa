"""Tables of speed and memory, from the rows of `docs/results/bench.jsonl`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from writing import table as markdown_table

from moa_peft.bench.rows import tokens_per_second
from moa_peft.json_lines import read_rows

FILE = Path(__file__).parent / "results" / "bench.jsonl"
Row = Mapping[str, Any]


def benchmarks() -> str:
    """One table for each piece of work, by device; rows with objections are left out."""
    rows = [row for row in read_rows(FILE) if not row["objections"]]
    devices: dict[str, dict[tuple[Any, ...], list[Row]]] = {}
    for row in rows:
        groups = devices.setdefault(row["provenance"]["device"], {})
        key = (
            *(row[one] for one in ("kind", "work", "model", "num_layers", "dtype", "baseline")),
            row["provenance"]["commit"],
        )
        groups.setdefault(key, []).append(row)
    sections = [
        "\n\n".join([f"## {device}", *[table(group) for group in groups.values()]])
        for device, groups in devices.items()
    ]
    return "\n\n".join(sections)


def brief() -> str:
    """What a mixture takes relative to PEFT's LoRA on a CPU: the default over that on the same layers, then the paper's methods."""
    paper = ("peft-lora-again", "soft-moa-no-prompt", "sparse-moa", "soft-moa")
    return f"{default_costs()}\n\n{_brief('peft-lora', paper)}"


def default_costs() -> str:
    """The first of these tables, for the README."""
    return _brief("peft-lora-all", ("soft-lora",))


def _brief(baseline: str, methods: Sequence[str]) -> str:
    """The time over one LoRA, and what backward keeps.

    Where the same work was measured several times, with as many operators a block as the last time: the median of the
    medians, and the outermost quartiles.
    """
    times: dict[str, dict[str, list[Row]]] = {}
    kept: dict[str, dict[str, str]] = {}
    kept_by_lora: dict[str, float] = {}
    for row in read_rows(FILE):
        if (
            not row["provenance"]["device"].startswith("cpu")
            or row["objections"]
            or row["baseline"] != baseline
        ):
            continue
        work = f"{row['work']}, {row['dtype']}"
        if row["kind"] in ("train", "decode") and row["over_baseline"] is not None:
            times.setdefault(f"time, {work}", {}).setdefault(row["method"], []).append(row)
        elif row["kind"] == "memory" and row["method"] == baseline:
            kept_by_lora[work] = row["saved_mib"]
        elif row["kind"] == "memory" and row["method"] in methods and work in kept_by_lora:
            ratio = f"{row['saved_mib'] / kept_by_lora[work]:.2f}"
            kept.setdefault(f"memory kept, {work}", {})[row["method"]] = ratio
    found = {work: {name: pooled(some) for name, some in of.items()} for work, of in times.items()} | kept
    lines = [[work, *(of.get(one, "-") for one in methods)] for work, of in found.items()]
    return markdown_table([f"over `{baseline}`", *(f"`{one}`" for one in methods)], lines)


def pooled(rows: Sequence[Row]) -> str:
    """The ratio over the baseline of several measurements of one method's work."""
    lower, middle, upper = zip(
        *(row["over_baseline"] for row in rows if row["operators"] == rows[-1]["operators"]), strict=True
    )
    return spread((min(lower), median(middle), max(upper)))


def table(rows: Sequence[Row]) -> str:
    """The rows of one piece of work as Markdown, with what is needed to repeat them."""
    first = rows[0]
    columns = [one for one in COLUMNS if any(one[1](row) != "-" for row in rows)]
    lines = [
        f"### {first['kind'].capitalize()}: {first['work']}",
        "",
        f"{first['model']}, {first['num_layers']} blocks, {first['dtype']}, in turn with `{first['baseline']}`.",
        "",
        "| " + " | ".join(name.format(**first) for name, _ in columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(value(row) for _, value in columns) + " |" for row in rows),
        "",
        *dict.fromkeys(source(row) for row in rows),
    ]
    return "\n".join(lines)


def source(row: Row) -> str:
    """Where a row comes from."""
    made = row["provenance"]
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("torch", "transformers", "peft"))
    command = made["command"].removeprefix(".venv/bin/")
    return f"`{command}` at commit `{made['commit'][:9]}`; {made['device']}, {made['threads']} threads; {versions}; {made['taken_at']}."


def spread(values: Sequence[float] | None) -> str:
    """A median with its quartiles."""
    return "-" if values is None else f"{values[1]:.3f} ({values[0]:.3f}-{values[2]:.3f})"


def number(key: str, form: str) -> Callable[[Row], str]:
    """Write a figure; a dash where there is none."""
    return lambda row: "-" if row[key] is None else format(row[key], form)


COLUMNS: Sequence[tuple[str, Callable[[Row], str]]] = (
    (
        "method",
        lambda row: f"`{row['method']}`" + (f", {row['num_experts']} copies" if row["num_experts"] else ""),
    ),
    ("parameters", number("trainable_parameters", ",")),
    ("ms", lambda row: f"{row['step_ms'][1]:,.0f}" if row["pairs"] else "-"),
    ("tokens/s", lambda row: f"{speed:,.0f}" if (speed := tokens_per_second(row)) else "-"),
    ("over `{baseline}`", lambda row: spread(row["over_baseline"])),
    ("over `frozen`", lambda row: spread(row["over_frozen"])),
    ("kept for backward, MiB", number("saved_mib", ",.1f")),
    ("peak, MiB", number("peak_mib", ",.0f")),
    ("held of the device, MiB", lambda row: f"{held:,.0f}" if (held := row.get("device_mib")) else "-"),
    ("GFLOP", lambda row: "-" if row["flops"] is None else f"{row['flops'] / 1e9:,.0f}"),
    ("operators a block", lambda row: f"{row['operators']:.0f}" if row["operators"] else "-"),
    ("of these no views", lambda row: f"{row['kernels']:.0f}" if row["kernels"] else "-"),
    ("error", number("max_abs_err", ".1e")),
)
