"""Arrival times: repeatable, at the rate that was asked for, as even as was asked for."""

from __future__ import annotations

import itertools
import statistics

import pytest

from sfumato.evaluation.load.arrivals import Load, arrival_times


def gaps(load: Load, count: int = 20_000) -> list[float]:
    """Return the times between arrivals."""
    return [later - earlier for earlier, later in itertools.pairwise(arrival_times(load, count, seed=0))]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_follow_the_gamma_law(burstiness: float) -> None:
    found = gaps(Load(is_open=True, rate=5.0, burstiness=burstiness))
    mean = statistics.fmean(found)
    assert mean == pytest.approx(1 / 5.0, rel=0.05)
    # A gamma law of this shape varies by one over its root; Poisson's varies by its mean.
    assert statistics.stdev(found) / mean == pytest.approx(burstiness**-0.5, rel=0.05)


def test_poisson_gaps_are_exponential() -> None:
    found = gaps(Load(is_open=True, rate=2.0))
    for seconds in (0.1, 0.5, 1.0):
        share = sum(gap > seconds for gap in found) / len(found)
        assert share == pytest.approx(2.718281828 ** (-2.0 * seconds), abs=0.02)


def test_the_same_seed_gives_the_same_arrivals() -> None:
    load = Load(is_open=True, rate=3.0)
    assert arrival_times(load, 50, seed=1) == arrival_times(load, 50, seed=1)
    assert arrival_times(load, 50, seed=1) != arrival_times(load, 50, seed=2)
    times = arrival_times(load, 50, seed=1)
    assert times[0] == 0.0
    assert times == sorted(times)


def test_nothing_spreads_a_closed_loop_or_all_at_once() -> None:
    for load in (Load(concurrency=4), Load(is_open=True)):
        assert arrival_times(load, 3, seed=0) == [0.0, 0.0, 0.0]
    assert arrival_times(Load(is_open=True, rate=1.0), 0, seed=0) == []


def test_loads_have_names() -> None:
    assert Load(concurrency=4).label == "4 at once"
    assert Load(is_open=True, rate=2.5).label == "2.5/s"
    assert Load(is_open=True).label == "all at once"
    assert Load(is_open=True, rate=2.0, concurrency=3).label == "2/s, at most 3 open"
