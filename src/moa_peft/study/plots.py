"""The plots of a study: accuracy against parameters and against the time of a step, the same bytes every time."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from moa_peft.study.config import FROZEN
from moa_peft.study.document import Picture
from moa_peft.study.statistics import MethodSummary, StudySummary, median_step_ms

_SETTINGS = {
    "svg.hashsalt": "moa-peft",
    "svg.fonttype": "none",  # text stays text, so no font of this machine is in the file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

_MARKERS = ("o", "s", "^", "D")
"""Shapes of ten methods each."""


def draw_plots(summary: StudySummary) -> list[Picture]:
    """Draw the plots for which a study has anything to show."""
    kinds: Sequence[tuple[str, str, Callable[[MethodSummary], float | None]]] = (
        ("accuracy_parameters", "trained parameters", lambda one: one.rows[0].trainable_parameters),
        ("accuracy_step_time", "time of a step, ms", median_step_ms),
    )
    frozen = next((one.mean for one in summary.methods if one.label == FROZEN), None)
    pictures: list[Picture] = []
    for name, axis, cost in kinds:
        points = [
            (one.label, cost(one), one.mean)
            for one in summary.methods
            if one.label != FROZEN and one.mean is not None and cost(one)
        ]
        if points:
            says = f"Mean accuracy against {axis}, with standard errors over seeds"
            svg = _draw(points, axis, None if frozen is None else frozen.mean)
            pictures.append(Picture(file=f"{name}.svg", says=says, svg=svg))
    return pictures


def _draw(points: Sequence[Any], axis: str, frozen: float | None) -> str:
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with style.context(["default", _SETTINGS]):
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        FigureCanvasSVG(figure)
        plot = figure.add_subplot()
        for place, (label, cost, mean) in enumerate(points):
            error = None if mean.error is None else 100 * mean.error
            look = {
                "color": f"C{place % 10}",
                "marker": _MARKERS[place // 10 % len(_MARKERS)],
                "label": label,
            }
            plot.errorbar([cost], [100 * mean.mean], yerr=error, linestyle="", capsize=3, **look)
        figure.legend(loc="outside right upper", frameon=False)
        if frozen is not None:
            plot.axhline(100 * frozen, linestyle="--", linewidth=1, color="0.5")
            place = (1, 100 * frozen)
            plot.annotate(
                FROZEN, place, xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4"
            )
        plot.set_xscale("log")
        plot.margins(x=0.2, y=0.2)
        plot.set_xlabel(axis)
        plot.set_ylabel("mean accuracy, %")
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"\A.*?(?=<svg )", "", written.getvalue(), flags=re.DOTALL)
