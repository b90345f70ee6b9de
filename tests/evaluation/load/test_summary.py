"""From records to figures, by hand and against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.evaluation.load.records import Record
from sfumato.evaluation.load.summary import distribution, meets, percentile, summarize


def record(index: int, due: float, sent: float, ended: float, **fields: Any) -> Record:
    """Return a record whose other fields are as given."""
    return Record(index=index, due=due, sent=sent, ended=ended, **fields)


@given(
    st.lists(st.floats(0, 1e4), min_size=1, max_size=200),
    st.sampled_from([0.0, 50.0, 90.0, 95.0, 99.0, 100.0]),
)
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(float(np.percentile(values, percent)))


def test_a_distribution_counts_what_is_there() -> None:
    found = distribution([3.0, None, 1.0, 2.0])
    assert found is not None
    assert (found.count, found.mean, found.median, found.max) == (3, 2.0, 2.0, 3.0)
    assert distribution([None]) is None


# The first waited a second to be sent, the third failed.
RECORDS = [
    record(0, 0.0, 1.0, 3.0, chunks=(1.5, 2.0, 3.0), prompt_tokens=10, output_tokens=5, nfe=2),
    record(1, 0.5, 0.5, 1.5, chunks=(1.0,), prompt_tokens=20, output_tokens=1, nfe=1),
    record(2, 1.0, 1.0, 4.0, error="gone"),
]


def test_latencies_count_from_when_a_request_was_due() -> None:
    first = RECORDS[0]
    assert (first.lag, first.time_to_first, first.end_to_end) == (1.0, 1.5, 3.0)
    assert first.per_token == pytest.approx(1.5 / 4)
    assert first.gaps == [0.5, 1.0]
    # With one token there is none behind the first.
    assert RECORDS[1].per_token is None
    latencies = summarize(RECORDS).latencies
    assert latencies.end_to_end is not None
    assert latencies.end_to_end_sent is not None
    assert (latencies.end_to_end.count, latencies.end_to_end.max) == (2, 3.0)
    assert latencies.end_to_end_sent.max == 2.0
    assert latencies.lag is not None
    assert latencies.lag.mean == 0.5


def test_rates_count_answered_requests_over_the_whole_run() -> None:
    summary = summarize(RECORDS)
    assert (summary.num_requests, summary.num_failed, summary.errors) == (3, 1, {"gone": 1})
    assert (summary.seconds, summary.requests_per_second) == (4.0, 0.5)
    assert (summary.output_tokens_per_second, summary.total_tokens_per_second) == (1.5, 9.0)
    assert (summary.mean_nfe, summary.tokens_per_forward) == (1.5, 2.0)
    assert summary.num_open_at_most == 3
    assert summary.goodput is None


def test_goodput_needs_every_target() -> None:
    goodput = summarize(RECORDS, {"e2e": 1.0, "ttft": 2.0}).goodput
    assert goodput is not None
    assert goodput.requests_per_second == 0.25
    assert goodput.share == pytest.approx(1 / 3)
    assert not meets(RECORDS[0], {"tpot": 0.1})
    assert meets(RECORDS[0], {"tpot": 0.5})
    assert meets(RECORDS[1], {"tpot": 0.001})


def test_nothing_answered_is_no_error() -> None:
    summary = summarize([RECORDS[2]], {"ttft": 1.0})
    assert summary.num_failed == 1
    assert summary.requests_per_second == summary.output_tokens_per_second == 0.0
    assert summary.latencies.end_to_end is None
    assert summary.goodput is not None
    assert summary.goodput.share == 0.0
