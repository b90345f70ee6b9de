"""The picture of a benchmark: latencies and throughput of a run, or one against the other over a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.errors import ConfigError
from sfumato.evaluation.drawing import FORMATS, write_figure
from sfumato.evaluation.load.report import Report, Run
from sfumato.evaluation.load.summary import Distribution

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Throughput over time is drawn in so many slices.
_SLICES = 40


def check_path(path: Path) -> None:
    """Raise ConfigError for a picture of another kind."""
    if path.suffix.removeprefix(".") not in FORMATS:
        raise ConfigError(f"--plot {path}: its name must end with .{' or .'.join(FORMATS)}")


def draw(report: Report, path: Path) -> None:
    """Write the picture. Raises ConfigError."""
    write_figure(lambda: make_figure(report), [path], f"--plot {path}")


def make_figure(report: Report) -> Figure:
    """Draw one run's distributions and its course, or a sweep's trade-off."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    if len(report.runs) == 1:
        _draw_shares(left, report, report.runs[0])
        _draw_course(right, report, report.runs[0])
        what = report.runs[0].load.label
    else:
        _draw_sweep(left, report, f"time to first {report.piece}, s", "time_to_first")
        _draw_sweep(right, report, "end to end, s", "end_to_end")
        what = f"{len(report.runs)} loads"
    figure.suptitle(f"{report.model}, {report.settings['num_requests']} requests, {what}", fontsize=10)
    return figure


def _draw_shares(axes: Axes, report: Report, run: Run) -> None:
    """Draw which share of the requests took at most so long."""
    good = [record for record in run.records if record.is_ok]
    for title, seconds in (
        (f"first {report.piece}", [record.time_to_first for record in good]),
        ("end to end", [record.end_to_end for record in good]),
    ):
        ordered = sorted(each for each in seconds if each is not None)
        if ordered:
            shares = [100 * (index + 1) / len(ordered) for index in range(len(ordered))]
            axes.step([ordered[0], *ordered], [0.0, *shares], where="post", label=title)
    axes.set_xlabel("seconds")
    axes.set_ylabel("requests, %")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 101)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_course(axes: Axes, report: Report, run: Run) -> None:
    """Draw what came out and how many requests were open, slice by slice."""
    from matplotlib.ticker import MaxNLocator

    end = max(record.ended for record in run.records)
    width = end / _SLICES
    made = [0.0] * _SLICES
    for record in run.records:
        for moment, amount in _amounts(report, run, record.index):
            made[min(_SLICES - 1, int(moment / width))] += amount / width
    middles = [(index + 0.5) * width for index in range(_SLICES)]
    axes.step(middles, made, where="mid", color="C2")
    axes.set_xlabel("seconds from the first request")
    axes.set_ylabel("pictures/s" if report.draws else "output tokens/s", color="C2")
    axes.set_ylim(bottom=0)
    beside = axes.twinx()
    beside.plot(middles, [_num_open(run, moment) for moment in middles], color="0.6", linewidth=1.2)
    beside.set_ylabel("open requests", color="0.4")
    beside.set_ylim(bottom=0)
    beside.yaxis.set_major_locator(MaxNLocator(integer=True))
    beside.grid(False)


def _amounts(report: Report, run: Run, index: int) -> Sequence[tuple[float, float]]:
    """Return when how much came of a request; tokens are shared out evenly among its pieces of text."""
    record = run.records[index]
    if not record.is_ok:
        return []
    if report.draws:
        return [(record.ended, 1.0)]
    tokens = record.output_tokens or 0
    return [(chunk, tokens / len(record.chunks)) for chunk in record.chunks]


def _num_open(run: Run, moment: float) -> int:
    return sum(record.sent <= moment < record.ended for record in run.records)


def _draw_sweep(axes: Axes, report: Report, title: str, name: str) -> None:
    """Draw median and 95th percentile of a latency against throughput, a point per run."""
    places = []
    for run in report.runs:
        found: Distribution | None = getattr(run.summary.latencies, name)
        if found is not None:
            summary = run.summary
            rate = summary.requests_per_second if report.draws else summary.output_tokens_per_second
            places.append((rate, found, run.load))
    rates = [rate for rate, _, _ in places]
    axes.plot(rates, [found.median for _, found, _ in places], marker="o", label="median")
    axes.plot(rates, [found.p95 for _, found, _ in places], marker="s", label="95th percentile")
    for rate, found, load in places:
        axes.annotate(
            load.short, (rate, found.p95), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_xlabel("pictures/s" if report.draws else "output tokens/s")
    axes.set_ylabel(title)
    axes.margins(x=0.08, y=0.12)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
