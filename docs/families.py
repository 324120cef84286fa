"""Tables of the families of models, from the rows of `docs/results/families.jsonl`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from writing import table

from moa_peft.json_lines import read_rows

FILE = Path(__file__).parent / "results" / "families.jsonl"
METHODS = ("soft-lora", "soft-moa", "sparse-moa", "molora", "lora")
Row = Mapping[str, Any]


def structures() -> str:
    """One row a structure: what its blocks are, and which methods work on it or why not."""
    rows = _rows("structure")
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["method"]] = row
    lines = [
        [
            name,
            f"`{found[METHODS[0]]['model_type']}`",
            _kinds(found),
            *(_result(found[one]) for one in METHODS),
        ]
        for name, found in sorted(by_name.items())
    ]
    reasons = sorted({row["reason"] for row in rows if row["result"] != "works"})
    numbered = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    source = rows[0]["provenance"]
    made = f"transformers {source['versions']['transformers']}, commit `{source['commit'][:10]}`, `{source['command']}`."
    return "\n\n".join([
        table(["structure", "model type", "blocks", *METHODS], lines),
        "\n".join(numbered),
        made,
    ])  # fmt: skip


def shapes() -> str:
    """What models of real size get, block kind by block kind."""
    lines: list[list[str]] = []
    for row in _rows("shape"):
        for block in row["blocks"]:
            left_out = "; ".join(block["left_out"]) or "-"
            placed = f"{block['count']} x {block['kind']}"
            lines.append([row["name"], row["method"], placed, ", ".join(block["experts"]), left_out])
        share = 100 * row["trainable_parameters"] / row["base_parameters"]
        lines.append([
            row["name"], row["method"], "in all",
            f"{row['trainable_parameters']:,} of {row['base_parameters']:,} parameters ({share:.2f} %)", "",
        ])  # fmt: skip
    return table(["model type", "method", "blocks", "experts", "left out"], lines)


def counts() -> str:
    """How many structures take each method, as the README has it."""
    rows = _rows("structure")
    works = {one: sum(row["result"] == "works" for row in rows if row["method"] == one) for one in METHODS}
    total = len({row["name"] for row in rows})
    return table(
        ["structures of transformers", *METHODS], [[str(total), *(str(works[one]) for one in METHODS)]]
    )


def _rows(kind: str) -> list[Row]:
    return [row for row in read_rows(FILE) if row["kind"] == kind]


def _kinds(found: Mapping[str, Row]) -> str:
    blocks: Sequence[Row] = next((row["blocks"] for row in found.values() if row["result"] == "works"), [])
    return "; ".join(dict.fromkeys(one["kind"] for one in blocks)) or "-"


def _result(row: Row) -> str:
    if row["result"] == "works":
        return "works"
    reasons = sorted({one["reason"] for one in _rows("structure") if one["result"] != "works"})
    return f"{row['result']} ({reasons.index(row['reason']) + 1})"
