"""The page of an inspection: one file with everything in it, which asks nothing of a network."""

import base64
import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from moa_peft.errors import UsageError
from moa_peft.extras import install_hint, is_installed
from moa_peft.inspection.gate_statistics import CLASSES, POSITIONS
from moa_peft.inspection.inspection import Inspection
from moa_peft.inspection.observer import Where
from moa_peft.inspection.results import Finding
from moa_peft.inspection.token_view import LEVELS, ShownPrompt, encode_gates
from moa_peft.json_lines import read_object
from moa_peft.provenance import provenance
from moa_peft.training.output_folder import write_text

GLOSSARY: Mapping[str, str] = {
    "mean_gate": "Mean gate: the gate of the expert, averaged over the tokens.",
    "deviation": "How much the gate varies: its standard deviation over the tokens. Near 0, the router does not look at "
    "the token.",
    "above_half_rate": "Tokens with a gate above 0.5: their share. Of gates that sum to 1, only one can be above.",
    "active_rate": "Tokens with a gate above 0: their share. Gates that cannot be switched off always are.",
    "load": "Load: the expert's part of the sum of all gates of its router.",
    "load_variation": "Load variation: the standard deviation of the load over the experts, divided by its mean. 0 where "
    "all are used alike; the root of their number less one where one has everything.",
    "entropy": "Evenness of a token's gates: their entropy, divided by its maximum. 1 where a token gives all experts the "
    "same, 0 where it gives one of them everything.",
    "active_experts": "Active experts of a token: how many of its gates are above 0.",
    "threshold": "Threshold: what a gate must reach to be on; the band is one standard deviation over the tokens.",
    "norm_share": "Share of the change: the mean length of what the expert adds, divided by the sum of those of its "
    "router's experts. They add to different outputs, so this compares sizes, not effects.",
    "norm": "Length of the change: the mean over the tokens of the Euclidean length of what the expert adds, gate included.",
    "effective_rank": "Effective rank: how many directions the change really uses, the exponential of the entropy of its "
    "singular values.",
    "mean_cka": "Similarity (linear CKA): 1 where two changes are the same but for turning and scaling, 0 where they have "
    "nothing in common. From few tokens it comes out too high.",
    "cosine": "Mean cosine: how far two changes of the same output point the same way. Changes of different outputs have "
    "none.",
    "captured": "Captured: the part of a change's energy that similarity and rank are taken of; 1 unless its directions are "
    "too many to keep.",
}
"""What each figure means, for the page."""


def page(inspection: Inspection, provenance: Mapping[str, Any]) -> str:
    """Write the page, as HTML; ``provenance`` is from `moa_peft.provenance`.

    Texts stand in it as text: escaped in the markup, and with no angle bracket in the data. The policy in its head
    allows this one script and this one style, and nothing from anywhere.
    """
    folder = resources.files("moa_peft.inspection") / "page"
    template, style, drawing, logic = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("page.html.j2", "page.css", "drawing.js", "page.js")
    )
    script = drawing + logic
    letters = ["A: ", "B: "] if len(inspection.findings) > 1 else [""]
    findings = zip(inspection.findings.items(), letters, strict=True)
    adapters = [_adapter(name, one, letter) for (name, one), letter in findings]
    page = Environment(autoescape=True).from_string(template)
    return page.render(
        title="What the router does",
        adapters=adapters,
        num_prompts=f"{inspection.num_prompts:,}",
        num_tokens=f"{inspection.num_tokens:,}",
        shown_note=_shown_note(inspection),
        glossary=[(text.split(": ", 1)[0], _sentence(text)) for text in GLOSSARY.values()],
        version=provenance["versions"]["moa-peft"],
        taken_at=provenance["taken_at"],
        style=Markup(style),  # a file of the package
        script=Markup(script),  # likewise
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=Markup(_inert(_data(inspection, adapters))),  # no angle bracket is left in it
    )


def as_object(inspection: Inspection, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Give the statistics as one JSON object, seven digits a number.

    Its fields are those of the dataclasses in `moa_peft.inspection.results`.
    """
    found = {
        "num_prompts": inspection.num_prompts,
        "num_tokens": inspection.num_tokens,
        "token_classes": list(CLASSES),
        "position_ranges": position_names(),
        "adapters": {name: dataclasses.asdict(one) for name, one in inspection.findings.items()},
        "agreement": [dataclasses.asdict(one) for one in inspection.agreement],
    }
    return {**rounded(found, 7), **provenance}


def position_names() -> list[str]:
    """Name the ranges of positions that gates are averaged over."""
    starts = [0, *(2**power for power in range(POSITIONS - 1))]
    ends = [one - 1 for one in starts[1:]]
    return [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=False)] + [f"{starts[-1]}-"]


def _adapter(name: str, finding: Finding, letter: str) -> dict[str, Any]:
    """What the markup needs of one adapter."""
    about = finding.about
    parameters: Sequence[Sequence[Any]] = about.get("parameters", ())
    facts = {key: value for key, value in about.items() if key not in ("config", "parameters")}
    return {
        "letter": letter,
        "name": about.get("adapter", name),
        "method": about.get("method"),
        "base_model": about.get("base_model", "its base model"),
        "sentences": finding.sentences,
        "facts": [(key.replace("_", " "), value) for key, value in facts.items() if value is not None],
        "parameters": [(part, f"{block:,}", f"{total:,}") for part, block, total in parameters],
        "config": json.dumps(about["config"], indent=2) if about.get("config") else "",
    }


def _data(inspection: Inspection, adapters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the script needs."""
    findings = inspection.findings
    layer, expert = _liveliest(next(iter(findings.values())))
    return {
        "levels": LEVELS,
        "classes": CLASSES,
        "positions": position_names(),
        "notes": {key: _sentence(text) for key, text in GLOSSARY.items()},
        "adapters": [
            {
                "title": f"{known['letter']}{known['name']}",
                "routers": [dataclasses.asdict(one) for one in finding.routers],
                "groups": [
                    {**dataclasses.asdict(one), "mean_cka": one.changes.mean_cka} for one in finding.groups
                ],
            }
            for known, finding in zip(adapters, findings.values(), strict=True)
        ],
        "agreement": [dataclasses.asdict(one) for one in inspection.agreement],
        "start_layer": layer,
        "start_expert": expert,
        "prompts": [_prompt(one, findings) for one in inspection.prompts],
    }


def _prompt(shown: ShownPrompt, findings: Mapping[str, Finding]) -> dict[str, Any]:
    own = "".join(
        piece
        for piece, kind in zip(shown.text.pieces, shown.text.classes, strict=True)
        if CLASSES[kind] not in ("template", "special")
    )
    return {
        "number": shown.number,
        "start": " ".join(own.split())[:60],
        "pieces": shown.text.pieces,
        "classes": shown.text.classes,
        "gates": [
            [encode_gates(shown.gates[Where(name, one.layer, one.router)]) for one in finding.routers]
            for name, finding in findings.items()
        ],
    }


def _liveliest(finding: Finding) -> tuple[int | None, str | None]:
    """The layer and the expert whose gate varies most over the tokens: the one to look at first."""
    if not finding.routers:
        return None, None
    first = finding.routers[0].router
    _, layer, name = max(
        (spread or 0, one.layer, name)
        for one in finding.routers
        if one.router == first
        for name, spread in zip(one.names, one.deviation, strict=True)
    )
    return layer, name


def _shown_note(inspection: Inspection) -> str:
    shown = inspection.prompts
    if not shown:
        return ""
    note = "Each token is shaded by the gate of the chosen expert in the chosen layer."
    if len(shown) < inspection.num_prompts:
        note += f" The first {len(shown)} of {inspection.num_prompts:,} prompts are shown, the last of them perhaps cut; every figure counts all."
    return note


def _sentence(text: str) -> str:
    meaning = text.split(": ", 1)[1]
    return meaning[0].upper() + meaning[1:]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _inert(data: Any) -> str:
    """Write data as JSON that no parser of markup can take for markup, with four digits a number."""
    text = json.dumps(rounded(data, 4), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def rounded(value: Any, digits: int) -> Any:
    """Round every number in mappings and lists to so many digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(one, digits) for key, one in value.items()}
    return [rounded(one, digits) for one in value] if isinstance(value, list | tuple) else value


def check_outputs(out: Path, json_file: Path | None, png: Path | None) -> None:
    """Check that all files can be written; folders that are missing are made.

    Raises:
        UsageError: If a name is not that of such a file, a folder cannot be made or written to, or matplotlib is missing.
    """
    for flag, file, suffix in (("--out", out, ".html"), ("--json", json_file, ".json")):
        if file is None:
            continue
        if file.is_dir() or file.suffix != suffix:
            raise UsageError(
                f"{flag} is {file}: give a file whose name ends in {suffix}, as in report{suffix}"
            )
        _check_folder(flag, file.parent)
    if json_file is not None and json_file.exists() and "token_classes" not in (read_object(json_file) or {}):
        raise UsageError(f"--json {json_file} exists and is no inspection: choose another file")
    if png is not None:
        if png.is_file() or (png.suffix and not png.is_dir()):
            raise UsageError(f"--png is {png}: give a folder, as in figures")
        if not is_installed("matplotlib"):
            raise UsageError(f"--png needs matplotlib: {install_hint('report')}, or leave it out")
        _check_folder("--png", png)


def write_outputs(
    found: Inspection, out: Path, json_file: Path | None, png: Path | None
) -> list[tuple[str, Path]]:
    """Write the page of an inspection, its statistics, and its figures into a folder; give what was written, and where."""
    made = provenance()
    written = [("page", out)]
    html, statistics = page(found, made), json.dumps(as_object(found, made), allow_nan=False)
    write_text(out, html)
    if json_file is not None:
        write_text(json_file, statistics + "\n")
        written.append(("numbers", json_file))
    if png is not None:
        from moa_peft.inspection.figures import write_figures

        written += [("figure", one) for one in write_figures(found, png)]
    return written


def _check_folder(flag: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag}: {folder} cannot be written to ({error.strerror}): choose another folder"
        ) from error
