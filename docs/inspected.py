"""What was seen in the demo's adapter, from the file that the inspection wrote: no number is typed."""

import json
from pathlib import Path
from typing import Any

from writing import table

FILE = Path(__file__).parent / "static" / "inspect" / "demo.json"


def inspected() -> str:
    """How the numbers came about, what the page says first, and the figures of some layers."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    finding = found["adapters"]["default"]
    most = max(finding["routers"], key=lambda one: max(one["deviation"]))
    shown = most["names"][most["deviation"].index(max(most["deviation"]))]  # the gate that varies most
    classes = [found["token_classes"].index(name) for name in ("word", "punctuation", "template")]
    rows = [
        _row(one, group, shown, classes)
        for one, group in zip(finding["routers"], finding["groups"], strict=True)
    ]
    step = max(len(rows) // 6, 1)
    chosen = [*rows[:-1:step], rows[-1]]
    heads = (
        "layer",
        "load variation",
        f"gate of `{shown}` at words",
        "at punctuation",
        "at the template",
        "its standard deviation",
        "its share of the change",
        "mean CKA of two experts",
    )
    made = f"Made by `{found['command'].removeprefix('.venv/bin/')}` at commit `{found['commit'][:10]}` with torch {found['versions']['torch']}, transformers {found['versions']['transformers']} and peft {found['versions']['peft']}: {found['num_prompts']} prompts, {found['num_tokens']} tokens."
    said = "\n".join(f"> {sentence}" for sentence in finding["sentences"])
    return "\n\n".join([said, table(heads, chosen), made])


def _row(router: dict[str, Any], group: dict[str, Any], shown: str, classes: list[int]) -> tuple[str, ...]:
    place, changes = router["names"].index(shown), group["changes"]
    pairs = [
        changes["cka"][a][b]
        for a in range(len(changes["names"]))
        for b in range(a)
        if changes["cka"][a][b] is not None
    ]
    figures = [
        router["load_variation"],
        *(router["by_class"][number][place] for number in classes),
        router["deviation"][place],
        changes["norm_share"][changes["names"].index(shown)],
        sum(pairs) / len(pairs),
    ]
    return (str(router["layer"]), *(f"{one:.3f}" for one in figures))
