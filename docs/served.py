"""The tables of what vLLM was run with, from the rows of `docs/results/serving.jsonl`."""

from pathlib import Path
from statistics import median

from wrapped import models, result, source
from writing import table

from moa_peft.json_lines import read_rows

FILE = Path(__file__).parent / "results" / "serving.jsonl"


def served() -> str:
    """What was compared, what was timed, and with what all were run; rows of a changed source are left out."""
    rows = [row for row in read_rows(FILE) if not row["provenance"]["dirty"]]
    compared = [row for row in rows if "rates" not in row]
    lines = [
        (row["wrapper"], row["ran"], models(row["models"]), result(row) + effect(row)) for row in compared
    ]
    timed = [
        (
            row["wrapper"].removeprefix("vLLM, throughput of "),
            row["ran"],
            {name: median(some) for name, some in row["rates"].items()},
        )
        for row in rows
        if "rates" in row
    ]
    rates = [
        (
            name,
            ran,
            *(f"{found[one]:.0f}" for one in ("base", "mixture", "transformers")),
            f"{100 * found['mixture'] / found['base']:.0f} %",
            f"{found['mixture'] / found['transformers']:.1f}",
        )
        for name, ran, found in timed
    ]
    heads = (
        "method",
        "tokens a CPU second",
        "vLLM, base",
        "vLLM, mixture",
        "transformers, mixture",
        "of the base",
        "over transformers",
    )
    return "\n\n".join(
        [
            table(("what", "what was run", "models", "result"), lines),
            table(heads, rates),
            *dict.fromkeys(source(row["provenance"]) for row in rows),
        ]
    )


def effect(row: dict[str, float]) -> str:
    """How much the adapter itself changes."""
    return f"; the adapter changes them by {row['effect']:.1f}" if "effect" in row else ""
