"""The figures of an inspection as PNG files, for papers; needs matplotlib."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moa_peft.inspection.inspection import Inspection
from moa_peft.inspection.results import Finding, Numbers

DPI = 200
"""Dots an inch: a figure of seven inches has 1,400."""


def write_figures(found: Inspection, folder: Path) -> list[Path]:
    """Draw, for each adapter and kind of router, a heat map of mean gates, one of shares of the change, and curves.

    Args:
        found: The inspection.
        folder: An existing folder; files of the same names are replaced.

    Returns:
        The files.
    """
    written: list[Path] = []
    for name, finding in found.findings.items():
        for router in dict.fromkeys(one.router for one in (*finding.routers, *finding.groups)):
            stem = "-".join(one for one in (name if len(found.findings) > 1 else "", router) if one)
            draw: dict[str, Callable[[Finding, str], Any]] = {
                "gates": _gates, "changes": _changes, "layers": _curves
            }  # fmt: skip
            for kind, drawing in draw.items():
                figure = drawing(finding, router)
                if figure is not None:
                    written.append(_save(figure, folder / f"{'-'.join(x for x in (stem, kind) if x)}.png"))
    return written


def _gates(finding: Finding, router: str) -> Any:
    chosen = [one for one in finding.routers if one.router == router]
    if not chosen:
        return None
    return _heat(
        [one.layer for one in chosen], chosen[0].names, [one.mean_gate for one in chosen], "mean gate"
    )


def _changes(finding: Finding, router: str) -> Any:
    chosen = [one for one in finding.groups if one.router == router]
    if not chosen:
        return None
    shares = [one.changes.norm_share for one in chosen]
    return _heat([one.layer for one in chosen], chosen[0].changes.names, shares, "share of the change")


def _heat(layers: Sequence[int], names: Sequence[str], rows: Sequence[Numbers], what: str) -> Any:
    from matplotlib.figure import Figure

    values = [[float("nan") if one is None else one for one in row] for row in zip(*rows, strict=True)]
    figure = Figure(figsize=(7, 1.2 + 0.25 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="cividis")
    axes.set_yticks(range(len(names)), names)
    step = max(len(layers) // 15, 1)
    axes.set_xticks(range(0, len(layers), step), [str(one) for one in layers[::step]])
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label=what)
    return figure


def _curves(finding: Finding, router: str) -> Any:
    from matplotlib.figure import Figure

    routers = [one for one in finding.routers if one.router == router]
    groups = [one for one in finding.groups if one.router == router]
    curves: list[tuple[str, list[int], list[float | None]]] = [
        ("load variation", [one.layer for one in routers], [one.load_variation for one in routers]),
        (
            "active experts of a token",
            [one.layer for one in routers],
            [one.active_experts for one in routers],
        ),
        (
            "mean threshold",
            [one.layer for one in routers],
            [None if one.threshold is None else one.threshold.mean for one in routers],
        ),
        ("mean CKA of a pair", [one.layer for one in groups], [one.changes.mean_cka for one in groups]),
    ]
    shown = [one for one in curves if any(value is not None for value in one[2])]
    if not shown:
        return None
    figure = Figure(figsize=(7, 1.9 * len(shown)), layout="constrained")
    for axes, (what, layers, values) in zip(
        figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True
    ):
        axes.plot(layers, [float("nan") if one is None else one for one in values], marker="o", markersize=3)
        axes.set_title(what, loc="left", fontsize="medium")
        axes.set_ylim(bottom=0)
    figure.axes[-1].set_xlabel("layer")
    return figure


def _save(figure: Any, file: Path) -> Path:
    draft = file.with_name(f".{file.name}.tmp")
    try:
        figure.savefig(draft, dpi=DPI, format="png")
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    return file
