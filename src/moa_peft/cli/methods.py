"""`moa methods`: what there is."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moa_peft.mixture.config import RouterConfig
    from moa_peft.mixture.presets import Preset


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead of a table.")] = False,
) -> None:
    """List the methods of the family, for --method and MoAConfig.preset.

    Example: moa methods
    """
    from rich.console import Console
    from rich.table import Table

    from moa_peft.mixture.presets import PRESETS

    rows = [
        {
            "method": name,
            "experts": experts_of(preset),
            "routing": routing_of(preset),
            "summary": preset.summary,
            "source": preset.source,
        }
        for name, preset in PRESETS.items()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    console = Console()
    for row in rows:
        console.print(f"[bold]{row['method']}[/bold]: {row['summary']}")
        table = Table.grid(padding=(0, 1))
        for what, text in (
            ("  experts", "; ".join(row["experts"])),
            ("  routing", "; ".join(routing_text(one) for one in row["routing"]) or "none"),
            ("  source", row["source"]),
        ):
            table.add_row(what, text)
        console.print(table)


def experts_of(preset: "Preset") -> list[str]:
    """Name the experts of a block with their sites, and how many copies of each there are, as "8 x lora at q_proj"."""
    named = []
    for one in preset.experts:
        copies, _ = one.copies()
        times = f"{copies} x " if copies > 1 else ""
        named.append(f"{times}{one.kind} at {', '.join(one.site_names())}")
    return named


def routing_of(preset: "Preset") -> list[dict[str, Any]]:
    """Say where a method is in the space of routings: one entry for each kind of router that a block has.

    Args:
        preset: The method.

    Returns:
        For each router its scope ("block": one for all experts; "site": one for the copies of each expert), what it
        weighs, its granularity, its gate with the options that are set, and its kind. Empty where nothing is routed.
    """
    block = preset.router
    found = [] if block is None else [_routing("block", f"{block.gate_of}s", block)]
    for expert in preset.experts:
        copies, router = expert.copies()
        entry = None if router is None else _routing("site", f"{copies} copies", router)
        if entry is not None and entry not in found:
            found.append(entry)
    return found


def routing_text(routing: dict[str, Any]) -> str:
    """Write an entry of `routing_of` in a line."""
    options = ", ".join(f"{name} {value}" for name, value in routing["options"].items())
    gate = routing["gate"] + (f" ({options})" if options else "")
    scope, weighs, granularity = routing["scope"], routing["weighs"], routing["granularity"]
    return f"{scope}: {gate} over the {weighs}, for each {granularity}, {routing['router']} router"


def _routing(scope: str, weighs: str, router: "RouterConfig") -> dict[str, Any]:
    threshold = router.threshold
    options = {
        "threshold": threshold and ("learned" if threshold.constant is None else threshold.constant),
        "keep": router.keep,
        "target": router.target,
    }
    return {
        "scope": scope,
        "weighs": weighs,
        "granularity": router.granularity,
        "gate": router.gate,
        "options": {name: value for name, value in options.items() if value is not None},
        "router": router.kind,
    }
