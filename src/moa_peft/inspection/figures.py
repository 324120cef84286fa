"""The figures of an inspection as PNG files, for papers; needs matplotlib."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moa_peft.inspection.inspection import Inspection
from moa_peft.inspection.results import Finding
from moa_peft.json_lines import written_whole

DPI = 200
"""Dots an inch: a figure of seven inches has 1,400."""


def write_figures(found: Inspection, folder: Path) -> list[Path]:
    """Draw, for each adapter and kind of router, a heat map of mean gates, one of shares of the change, and curves.

    Files of the same names in the folder, which exists, are replaced. Gives the files.
    """
    written: list[Path] = []
    for name, finding in found.findings.items():
        for router in dict.fromkeys(one.router for one in (*finding.routers, *finding.groups)):
            for kind, figure in _figures(finding, router):
                parts = (name if len(found.findings) > 1 else "", router, kind)
                written.append(_save(figure, folder / f"{'-'.join(filter(None, parts))}.png"))
    return written


def _figures(finding: Finding, router: str) -> Iterator[tuple[str, Any]]:
    routers = [one for one in finding.routers if one.router == router]
    groups = [one for one in finding.groups if one.router == router]
    if routers:
        gates = {one.layer: dict(zip(one.names, one.mean_gate, strict=True)) for one in routers}
        yield "gates", _heat(gates, "mean gate")
    if groups:
        changes = {one.layer: one.changes for one in groups}
        shares = {layer: dict(zip(one.names, one.norm_share, strict=True)) for layer, one in changes.items()}
        yield "changes", _heat(shares, "share of the change")
    curves = [
        ("load variation", [(one.layer, one.load_variation) for one in routers]),
        ("active experts of a token", [(one.layer, one.active_experts) for one in routers]),
        ("mean threshold", [(one.layer, one.threshold and one.threshold.mean) for one in routers]),
        ("mean CKA of a pair", [(one.layer, one.changes.mean_cka) for one in groups]),
    ]
    shown = [(what, curve) for what, curve in curves if any(value is not None for _, value in curve)]
    if shown:
        yield "layers", _curves(shown)


def _heat(by_layer: Mapping[int, Mapping[str, float | None]], what: str) -> Any:
    """A heat map of experts, by name, against layers; empty where a layer has not the expert, or no value of it."""
    from matplotlib.figure import Figure

    layers = list(by_layer)
    names = list(dict.fromkeys(name for row in by_layer.values() for name in row))
    found = [[row.get(name) for row in by_layer.values()] for name in names]
    values = [[float("nan") if one is None else one for one in row] for row in found]
    figure = Figure(figsize=(7, 1.2 + 0.25 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="cividis")
    axes.set_yticks(range(len(names)), names)
    step = max(len(layers) // 15, 1)
    axes.set_xticks(range(0, len(layers), step), [str(one) for one in layers[::step]])
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label=what)
    return figure


def _curves(curves: Sequence[tuple[str, Sequence[tuple[int, float | None]]]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.9 * len(curves)), layout="constrained")
    for axes, (what, curve) in zip(figure.subplots(len(curves), squeeze=False)[:, 0], curves, strict=True):
        values = [float("nan") if one is None else one for _, one in curve]
        axes.plot([layer for layer, _ in curve], values, marker="o", markersize=3)
        axes.set_title(what, loc="left", fontsize="medium")
        axes.set_ylim(bottom=0)
        axes.margins(y=0.1)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[-1].set_xlabel("layer")
    return figure


def _save(figure: Any, file: Path) -> Path:
    with written_whole(file) as draft:
        figure.savefig(draft, dpi=DPI, format="png")
    return file
