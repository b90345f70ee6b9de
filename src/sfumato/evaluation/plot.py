"""The picture of a report: accuracy against tokens per forward, a curve per algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.evaluation.drawing import FORMATS, write_figure
from sfumato.evaluation.report import CurveReport, Report
from sfumato.evaluation.scores import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

_MARKERS = "osD^vPXh"
_DEFAULT = "what is served by default"
# How far above or below its point a value may stand, in points: the first place that is free is taken.
_HEIGHTS = (11, -11, 21, -21, 31, -31)
# The side of a point's marker with its ring, in pixels.
_MARKER_PIXELS = 15


def draw(report: Report, folder: Path) -> list[Path]:
    """Write curve.png and curve.svg and return their paths. Raises ConfigError."""
    paths = [folder / f"curve.{each}" for each in FORMATS]
    write_figure(lambda: make_figure(report), paths, f"--out {folder}")
    return paths


def make_figure(report: Report) -> Figure:
    """Draw curves with intervals, what is served by default, and the swept values where there is room."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for index, curve in enumerate(report.curves):
        _draw_curve(axes, curve, index)
    _mark_default(axes, report)
    axes.set_xlabel("tokens per forward (TPF), all tokens over all forwards")
    axes.set_ylabel("exact answers, %")
    number = report.settings["num_questions"]
    axes.set_title(f"{report.task}, {report.model}: {number} questions, bars: 95 % interval", fontsize=10)
    axes.margins(x=0.08, y=0.15)
    handles, labels = axes.get_legend_handles_labels()
    # Curves first: matplotlib puts plain lines in front of lines with bars.
    order = sorted(range(len(labels)), key=lambda index: labels[index] == _DEFAULT)
    figure.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    # Places in pixels are known once it was drawn.
    figure.draw_without_rendering()
    _name_values(axes, report)
    return figure


def _shown(curve: CurveReport) -> list[tuple[float, Point]]:
    """Return the points that have a place, from slow to fast."""
    placed = [(point.tpf, point) for point in curve.points if point.tpf is not None]
    return sorted(placed, key=lambda each: each[0])


def _draw_curve(axes: Axes, curve: CurveReport, index: int) -> None:
    shown = _shown(curve)
    swept = "" if curve.parameter is None else f" by {curve.parameter}"
    score = "" if curve.aup is None else f", AUP {curve.aup:.0f}"
    accuracies = [point.accuracy for _, point in shown]
    _, _, bars = axes.errorbar(
        [tpf for tpf, _ in shown],
        accuracies,
        yerr=[
            [point.accuracy - point.accuracy_low for _, point in shown],
            [point.accuracy_high - point.accuracy for _, point in shown],
        ],
        color=f"C{index % 10}",
        marker=_MARKERS[index % len(_MARKERS)],
        # Later curves are drawn over earlier ones, whose points must still be seen where both meet.
        markersize=max(4, 8 - 1.5 * index),
        linewidth=1.6,
        elinewidth=2,
        label=f"{curve.algorithm}{swept}{score}",
    )
    for bar in bars:
        bar.set_alpha(0.25)


def _mark_default(axes: Axes, report: Report) -> None:
    defaults = [(tpf, point) for curve in report.curves for tpf, point in _shown(curve) if point.is_default]
    if defaults:
        axes.plot(
            [tpf for tpf, _ in defaults],
            [point.accuracy for _, point in defaults],
            linestyle="none",
            marker="o",
            markersize=13,
            markerfacecolor="none",
            markeredgecolor="0.2",
            label=_DEFAULT,
        )


def _name_values(axes: Axes, report: Report) -> None:
    """Write the swept values above or below their points; one without a free place is left out.

    Where curves meet with the same value it stands once.
    """
    from matplotlib.transforms import Bbox

    places = [
        [(axes.transData.transform((tpf, point.accuracy)), point) for tpf, point in _shown(curve)]
        for curve in report.curves
    ]
    half = _MARKER_PIXELS / 2
    taken = [
        Bbox.from_extents(x - half, y - half, x + half, y + half) for each in places for (x, y), _ in each
    ]
    named: set[tuple[int, int, str]] = set()
    for index, (curve, points) in enumerate(zip(report.curves, places, strict=True)):
        for (x, y), point in points if curve.parameter is not None else ():
            name = (round(x), round(y), point.shown_value)
            if name not in named and _name_value(axes, point, f"C{index % 10}", taken):
                named.add(name)


def _name_value(axes: Axes, point: Point, color: str, taken: list[Bbox]) -> bool:
    """Write one value where nothing is yet, and add its place; tell whether there was one."""
    from matplotlib.patheffects import withStroke

    for height in _HEIGHTS:
        text = axes.annotate(
            point.shown_value,
            (point.tpf or 0.0, point.accuracy),
            xytext=(0, height),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=color,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )
        text.set_in_layout(False)
        box = text.get_window_extent()
        is_inside = axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
        if is_inside and not any(box.overlaps(other) for other in taken):
            taken.append(box)
            return True
        text.remove()
    return False
