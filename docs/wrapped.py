"""The table of wrappers, from the rows of `docs/results/wrappers.jsonl`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from writing import table

from moa_peft.json_lines import read_rows

FILE = Path(__file__).parent / "results" / "wrappers.jsonl"


def wrappers() -> str:
    """One row for each wrapper, and with what all were run; rows of a changed source are left out."""
    rows = [row for row in read_rows(FILE) if not row["provenance"]["dirty"]]
    heads = ("wrapper", "what was run", "models", "result")
    lines = [(row["wrapper"], row["ran"], models(row["models"]), result(row)) for row in rows]
    return "\n\n".join([table(heads, lines), *dict.fromkeys(source(row["provenance"]) for row in rows)])


def models(named: Sequence[str]) -> str:
    """The methods that were run on each family."""
    methods: dict[str, list[str]] = {}
    for one in named:
        family, method = one.split(maxsplit=1)
        methods.setdefault(family, []).append(method)
    return "; ".join(f"{family}: {', '.join(some)}" for family, some in methods.items())


def result(row: Mapping[str, Any]) -> str:
    """How far apart the runs were, or what the refusal says."""
    if "refused" in row:
        return f"**refused**: {row['refused']}"
    apart = f"{row['difference']:.0e} apart" if row["difference"] else "the same"
    return f"{row['compared']} are {apart}" + (f" (limit {row['limit']:.0e})" if row["limit"] else "")


def source(made: Mapping[str, Any]) -> str:
    """Where the rows come from."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return f"`{made['command']}` at commit `{made['commit'][:9]}`; {made['device']}, {made['threads']} thread a process; {versions}; {made['taken_at']}."
