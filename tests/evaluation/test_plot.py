"""The picture: both files, every curve by name, the default marked, no value over another."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sfumato.errors import ConfigError
from sfumato.evaluation import drawing, plot
from sfumato.evaluation.report import CurveReport, Report
from sfumato.evaluation.scores import Point


def point(value: Any, tpf: float | None, accuracy: float, *, is_default: bool = False) -> Point:
    """Return a point with figures that do not matter here."""
    return Point(
        parameter="threshold",
        value=value,
        parameters={},
        is_default=is_default,
        num_questions=10,
        num_correct=int(accuracy / 10),
        num_failed=0,
        num_cut_off=0,
        num_spared_prefills=0,
        accuracy=accuracy,
        accuracy_low=accuracy - 10,
        accuracy_high=min(100.0, accuracy + 5),
        tpf=tpf,
        mean_request_tpf=tpf,
        mean_nfe=2.0,
        mean_tokens=8.0,
        mean_seconds=0.1,
        tokens_per_second=100.0,
        failures=(),
    )


def report(*curves: CurveReport) -> Report:
    """Return a report of curves."""
    return Report(
        task="sums", model="m_1", settings={"num_questions": 10}, where={}, best_accuracy=90.0, curves=curves
    )


def test_both_files_are_written(tmp_path: Path) -> None:
    fast = CurveReport(
        algorithm="fast_one",
        parameter="threshold",
        aup=321.4,
        points=(point(0.5, 4.0, 80.0), point(0.9, 2.0, 90.0, is_default=True), point("low", None, 0.0)),
    )
    same = CurveReport(algorithm="same", parameter="threshold", aup=None, points=fast.points[:1])
    alone = CurveReport(algorithm="alone", parameter=None, aup=100.0, points=(point(None, 1.0, 85.0),))
    png, svg = plot.draw(report(fast, same, alone), tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 10_000
    ElementTree.parse(svg)
    drawn = svg.read_text()
    for word in (
        "sums, m_1: 10 questions",
        "fast_one by threshold, AUP 321",
        "same by threshold",
        "alone, AUP 100",
        "what is served by default",
        "tokens per forward",
        "exact answers, %",
    ):
        assert f"<!-- {word}" in drawn
    again = plot.draw(report(fast, same, alone), tmp_path)[1].read_text()
    assert again == drawn


def test_no_value_covers_another() -> None:
    crowd = CurveReport(
        algorithm="a",
        parameter="threshold",
        aup=None,
        points=(*(point(n / 10, 2.0 + 0.01 * n, 80.0) for n in range(9)), point(2, 9.0, 90.0)),
    )
    figure = plot.make_figure(report(crowd))
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert 2 <= len(boxes) < 10
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_without_matplotlib_there_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--plot needs matplotlib: pip install 'sfumato\[eval\]'"):
        drawing.require_plot()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    curve = CurveReport(algorithm="a", parameter=None, aup=1.0, points=(point(None, 1.0, 85.0),))
    with pytest.raises(ConfigError, match="nowhere"):
        plot.draw(report(curve), tmp_path / "nowhere")
