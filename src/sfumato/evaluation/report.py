"""What an evaluation found, as one JSON file and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sfumato.errors import ConfigError
from sfumato.evaluation.scores import Point, accuracy_under_parallelism
from sfumato.evaluation.sweep import Curve


class CurveReport(msgspec.Struct, frozen=True, kw_only=True):
    """The points of one algorithm in the order of the sweep, and their score."""

    algorithm: str
    parameter: str | None
    aup: float | None
    points: tuple[Point, ...]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is needed to read the figures, and to make them again.

    settings: what all points share. where: machine or server. best_accuracy: of any point, in percent; the
    AUP scores are relative to it.
    """

    task: str
    model: str
    settings: dict[str, Any]
    where: dict[str, Any]
    best_accuracy: float
    curves: tuple[CurveReport, ...]

    @property
    def points(self) -> list[Point]:
        """Return the points of all curves."""
        return [point for curve in self.curves for point in curve.points]


def make_report(
    task: str,
    model: str,
    settings: dict[str, Any],
    where: dict[str, Any],
    scored: Sequence[tuple[Curve, Sequence[Point]]],
    best_accuracy: float | None = None,
) -> Report:
    """Put curves and their points together; best_accuracy: of methods that are measured elsewhere."""
    best = max(point.accuracy for _, points in scored for point in points)
    best = max(best, best_accuracy or 0.0)
    curves = tuple(
        CurveReport(
            algorithm=curve.algorithm,
            parameter=curve.parameter,
            aup=accuracy_under_parallelism(
                [(point.tpf, point.accuracy) for point in points if point.tpf is not None], best
            ),
            points=tuple(points),
        )
        for curve, points in scored
    )
    return Report(task=task, model=model, settings=settings, where=where, best_accuracy=best, curves=curves)


def write_report(report: Report, folder: Path) -> Path:
    """Write report.json and return its path. Raises ConfigError."""
    path = folder / "report.json"
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror}") from error
    return path


def as_tables(report: Report) -> list[Table]:
    """Return a table per curve with a line per point."""
    return [_as_table(curve) for curve in report.curves]


def _as_table(curve: CurveReport) -> Table:
    by = "" if curve.parameter is None else f" by {curve.parameter}"
    table = Table(
        title=f"{curve.algorithm}{by}: AUP {_figure(curve.aup, 1)}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
    )
    for name in ("value", "correct", "95 %", "TPF", "NFE", "tokens/s", "questions", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in curve.points:
        value = "" if curve.parameter is None else point.shown_value
        table.add_row(
            f"{value}{' *' if point.is_default else ''}",
            f"{point.accuracy:.1f} %",
            f"{point.accuracy_low:.1f}-{point.accuracy_high:.1f}",
            _figure(point.tpf, 2),
            _figure(point.mean_nfe, 1),
            _figure(point.tokens_per_second, 0),
            str(point.num_questions),
            str(point.num_failed),
        )
    return table


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
