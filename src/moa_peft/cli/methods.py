"""`moa methods`: what there is."""

import json
from typing import Annotated

import typer


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead of a table.")] = False,
) -> None:
    """List the methods of the family, for --method and MoAConfig.preset.

    Example: moa methods
    """
    from rich.console import Console
    from rich.table import Table

    from moa_peft.presets import PRESETS

    rows = [
        {
            "method": name,
            "experts": [f"{one.kind} at {', '.join(one.site_names())}" for one in preset.experts()],
            "summary": preset.summary,
            "source": preset.source,
        }
        for name, preset in PRESETS.items()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("method", "what it does", "experts of a block", "source")
    for row in rows:
        table.add_row(row["method"], row["summary"], "; ".join(row["experts"]), row["source"])
    Console().print(table)
