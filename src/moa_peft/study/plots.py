"""The plots of a study, the same bytes every time: what its methods reach against what they cost and what they forget."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moa_peft.evaluation.results import file_name
from moa_peft.study.config import FROZEN
from moa_peft.study.document import Picture
from moa_peft.study.statistics import MethodSummary, StudySummary, devices, median_step_ms

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

Value = tuple[float, float | None]
"""A figure of a method, and its standard error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    name: str
    """In the name of the plot's file."""
    text: str
    """What stands beside the axis."""
    figures: Mapping[str, Value]
    """By method; those that have one."""
    log: bool = False


def draw_plots(summary: StudySummary) -> list[Picture]:
    """Draw the plots for which a study has anything to show: the mean accuracy, and losses of the tests that have none."""
    methods = [one for one in summary.methods if one.label != FROZEN]
    parameters = _Axis(
        name="parameters",
        text="trained parameters",
        figures={
            one.label: (float(count), None) for one in methods if (count := one.rows[0].trainable_parameters)
        },
        log=True,
    )
    times = {one.label: (time, None) for one in methods if (time := median_step_ms(one)) is not None}
    if len(devices(methods)) > 1:
        times = {}
    step_time = _Axis(name="step_time", text="time of a step, ms", figures=times, log=True)
    forgetting = _Axis(
        name="forgetting",
        text="accuracy on other tasks less the frozen model's, points",
        figures={
            one.label: (100 * one.forgetting_mean.mean, _hundredfold(one.forgetting_mean.error))
            for one in methods
            if one.forgetting_mean is not None
        },
    )
    pairs = [(x, _accuracy(summary.methods)) for x in (parameters, step_time)]
    pairs += [
        (x, _loss(methods, test))
        for test in summary.tests
        if test not in summary.scored
        for x in (parameters, forgetting)
    ]
    labels = [one.label for one in methods]
    return [
        Picture(
            file=file_name(f"{y.name}_{x.name}.svg"),
            says=f"{y.text.capitalize()} against {x.text}, with standard errors",
            svg=_draw(labels, x, y),
        )
        for x, y in pairs
        if any(label in x.figures and label in y.figures for label in labels)
    ]


def _accuracy(methods: Sequence[MethodSummary]) -> _Axis:
    figures = {
        one.label: (100 * one.mean.mean, _hundredfold(one.mean.error))
        for one in methods
        if one.mean is not None
    }
    return _Axis(name="accuracy", text="mean accuracy, %", figures=figures)


def _loss(methods: Sequence[MethodSummary], test: str) -> _Axis:
    figures = {
        one.label: (one.losses[test].mean, one.losses[test].error) for one in methods if test in one.losses
    }
    return _Axis(name=f"loss_{test}", text=f"loss of the answers of {test}, nats a token", figures=figures)


def _hundredfold(error: float | None) -> float | None:
    return None if error is None else 100 * error


def _draw(labels: Sequence[str], x: _Axis, y: _Axis) -> str:
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with style.context(["default", _SETTINGS]):
        shown = [label for label in labels if label in x.figures and label in y.figures]
        longest = max(map(len, shown))
        # inches for every line of the legend, and for labels longer than most beside the axes
        size = 9 + 0.09 * max(0, longest - 24), max(4.5, 0.23 * (len(shown) + 1))
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        plot = figure.add_subplot()
        for place, label in enumerate(shown):
            look: dict[str, Any] = {
                "color": f"C{place % 10}",
                "marker": _MARKERS[place // 10 % len(_MARKERS)],
            }
            (across, width), (up, height) = x.figures[label], y.figures[label]
            plot.errorbar(
                [across], [up], xerr=width, yerr=height, linestyle="", capsize=3, label=label, **look
            )
        figure.legend(loc="outside right upper", frameon=False)
        places = [x.figures[label][0] for label in shown]
        if x.log and max(places) >= 3 * min(places):  # closer ones get ticks such as 2.74e6
            plot.set_xscale("log")
        plot.margins(x=0.2, y=0.2)
        if FROZEN in y.figures:
            _mark_frozen(plot, y.figures[FROZEN][0])
        plot.set_xlabel(x.text, parse_math=False)
        plot.set_ylabel(y.text, parse_math=False)  # a test's name may hold a $
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"\A.*?(?=<svg )", "", written.getvalue(), flags=re.DOTALL)


def _mark_frozen(plot: Any, value: float) -> None:
    """Draw a line for the frozen model, or write its value at the edge where the line would leave the methods little room."""
    low, high = plot.get_ylim()
    room = high - low
    if low - room < value < high + room:
        plot.axhline(value, linestyle="--", linewidth=1, color="0.5")
        text, place = FROZEN, value
    else:
        text, place = f"{FROZEN}: {value:.1f}", low if value < low else high
    plot.annotate(
        text,
        (1, place),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="top" if place == high else "bottom",
        color="0.4",
    )
