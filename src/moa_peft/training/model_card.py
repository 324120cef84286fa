"""The model card of an adapter."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moa_peft.errors import expanded
from moa_peft.mixture.placement import Placement
from moa_peft.mixture.presets import find_preset
from moa_peft.training.output_folder import write_text

CARD_FILE = "README.md"
TAGS = ("moa", "mixture-of-adapters", "peft")
HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What the hub calls the models that moa has short names for."""

_UNSAID = ("resume", "output_dir", "model", "data", "data_split", "data_md5", "validation_md5", "method")


def write_card(folder: Path, row: Mapping[str, Any], recipe: Mapping[str, Any], loader: str) -> None:
    """Write the card of a run into the folder of its adapter.

    Args:
        folder: Where the adapter lies.
        row: The run's row of results.
        recipe: The run's resolved recipe.
        loader: The class of transformers that loads the base model.
    """
    losses = {"training": row["final_loss"], "held-out": row["validation_loss"]}
    table = [f"| {what} loss, at the end | {loss:.4f} |" for what, loss in losses.items() if loss is not None]
    results = ["## Results", "", "| what | value |", "| --- | --- |", *table, ""]
    write_text(folder / CARD_FILE, card_text(row, recipe, loader) + "\n".join(results))


def _metadata(recipe: Mapping[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    metadata["tags"] = [*TAGS, recipe["method"]]
    base = str(HUB_NAMES.get(recipe["model"], recipe["model"]))
    if not expanded(base).exists():  # a folder of this machine means nothing to others
        metadata["tags"].append(f"base_model:adapter:{base}")
        metadata["base_model"] = base
    return metadata


def card_text(row: Mapping[str, Any], recipe: Mapping[str, Any], loader: str) -> str:
    """Write a card up to its results.

    Args:
        row: The run's row of results.
        recipe: The run's resolved recipe.
        loader: The class of transformers that loads the base model.

    Returns:
        Markdown with the metadata that the hub reads.
    """
    settings = [
        f"| {name} | `{_cell(value)}` |" for name, value in sorted(recipe.items()) if name not in _UNSAID
    ]
    revision = (recipe.get("model_init_kwargs") or {}).get("revision")
    revision = "" if revision is None else f', revision="{revision}"'  # transformers takes the name alone
    preset = find_preset(recipe["method"])
    source = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", preset.source)
    share = 100 * row["trainable_parameters"] / row["total_parameters"]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(_metadata(recipe), sort_keys=False).rstrip(),
            "---",
            "",
            f"# {recipe['method']} on {Path(recipe['model']).name}",
            "",
            f"A mixture of adapters, method `{recipe['method']}`, for the frozen base model `{recipe['model']}`.",
            f"Trained parameters: {row['trainable_parameters']:,} ({share:.2f} % of all).",
            f"Trained on {row['rows_kept']:,} rows of `{recipe['data']}` (MD5 {recipe['data_md5']}),",
            f"{row['steps']:,} steps; instruction template: {recipe['template']}.",
            "",
            *(f"- {Placement(**one).text()}" for one in row["placements"]),
            "",
            "## Use",
            "",
            f"With moa-peft {row['versions']['moa-peft']}, installed from its checkout:",
            "",
            "```python",
            "import moa_peft  # makes the method known to PEFT",
            f"from transformers import {loader}",
            "",
            f'model = {loader}.from_pretrained("path/to/this/folder"{revision})',
            "```",
            "",
            "## How it was made",
            "",
            "`moa train --config moa_recipe.json --output_dir NEW_FOLDER` repeats the run; `results.jsonl` has versions,",
            "command and speed.",
            "",
            "| setting | value |",
            "|---|---|",
            *settings,
            "",
            f"Method: {preset.summary}. Source: {source}.",
            "",
            "",
        ]
    )


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
