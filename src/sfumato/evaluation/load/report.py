"""What a benchmark found: one JSON file with everything in it, and tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sfumato.errors import ConfigError
from sfumato.evaluation.load.arrivals import Load
from sfumato.evaluation.load.records import Record
from sfumato.evaluation.load.summary import Distribution, Summary

# Raised when a field is removed or comes to mean something else.
VERSION = 1
_LATENCIES = (
    ("time_to_first", "time to first {piece}"),
    ("per_token", "time per output token"),
    ("between", "between pieces"),
    ("end_to_end", "end to end"),
    ("time_to_first_sent", "first {piece}, from sending"),
    ("end_to_end_sent", "end to end, from sending"),
    ("lag", "sent later than due"),
)
# Shown where requests are due at given times; else they are due when they are sent.
_OPEN_ONLY = {"time_to_first_sent", "end_to_end_sent", "lag"}


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One load with what it showed."""

    load: Load
    summary: Summary
    records: tuple[Record, ...]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is needed to read the figures, and to make them again.

    endpoint: chat, completions or images. settings: what all runs share. started_at: UTC, ISO 8601.
    """

    version: int
    model: str
    endpoint: str
    started_at: str
    settings: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def draws(self) -> bool:
        """Whether pictures were asked for."""
        return self.endpoint == "images"

    @property
    def piece(self) -> str:
        """Return what comes first of an answer."""
        return "preview" if self.draws else "text"


def write_report(report: Report, path: Path) -> None:
    """Write the file. Raises ConfigError."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from error


def run_tables(report: Report, run: Run) -> list[Table]:
    """Return the figures of one run, and its latencies in milliseconds."""
    has_answers = run.summary.num_failed < run.summary.num_requests
    return [_figures(report, run), *([_latencies(report, run)] if has_answers else [])]


def _figures(report: Report, run: Run) -> Table:
    summary = run.summary
    table = Table(title=run.load.label, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("requests", str(summary.num_requests))
    table.add_row("failed", str(summary.num_failed))
    table.add_row("open at once, at most", str(summary.num_open_at_most))
    table.add_row("seconds", f"{summary.seconds:.2f}")
    table.add_row("requests/s", f"{summary.requests_per_second:.2f}")
    if not report.draws:
        table.add_row("output tokens", str(summary.output_tokens))
        table.add_row("output tokens/s", f"{summary.output_tokens_per_second:.1f}")
        table.add_row("total tokens/s", f"{summary.total_tokens_per_second:.1f}")
    if summary.mean_nfe is not None:
        table.add_row("forwards per request", f"{summary.mean_nfe:.1f}")
    if summary.tokens_per_forward is not None:
        table.add_row("tokens per forward", f"{summary.tokens_per_forward:.2f}")
    if summary.goodput is not None:
        table.add_row("good requests/s", f"{summary.goodput.requests_per_second:.2f}")
        table.add_row("good requests", f"{100 * summary.goodput.share:.1f} %")
    return table


def _latencies(report: Report, run: Run) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("ms", no_wrap=True)
    for name in ("mean", "median", "p90", "p95", "p99", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, title in _LATENCIES:
        found: Distribution | None = getattr(run.summary.latencies, name)
        if found is None or (name in _OPEN_ONLY and not run.load.is_open):
            continue
        figures = (found.mean, found.median, found.p90, found.p95, found.p99, found.max)
        table.add_row(title.format(piece=report.piece), *map(_milliseconds, figures))
    return table


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.{1 if seconds < 1 else 0}f}"


def sweep_table(report: Report) -> Table:
    """Return a line per run: throughput against medians and 95th percentiles of first piece and end."""
    table = Table(title="sweep, latencies in ms", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name in ("load", "failed", "req/s", "tok/s", "first", "p95", "end", "p95", "good/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in report.runs:
        summary, latencies = run.summary, run.summary.latencies
        table.add_row(
            run.load.label,
            str(summary.num_failed),
            f"{summary.requests_per_second:.2f}",
            "-" if report.draws else f"{summary.output_tokens_per_second:.1f}",
            *_median_and_p95(latencies.time_to_first),
            *_median_and_p95(latencies.end_to_end),
            "-" if summary.goodput is None else f"{summary.goodput.requests_per_second:.2f}",
        )
    return table


def _median_and_p95(found: Distribution | None) -> Sequence[str]:
    return ("-", "-") if found is None else (f"{1000 * found.median:.0f}", f"{1000 * found.p95:.0f}")
