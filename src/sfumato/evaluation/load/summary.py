"""From records to figures: distributions of latencies, throughput, and goodput under targets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import msgspec

from sfumato.evaluation.load.records import Record

# What a target may be set for, by the names that other benchmarks use.
TARGETS: Mapping[str, Callable[[Record], float | None]] = {
    "ttft": lambda record: record.time_to_first,
    "tpot": lambda record: record.per_token,
    "e2e": lambda record: record.end_to_end,
}


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of some requests."""

    count: int
    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    max: float


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """Distributions over the requests that were answered; None where nothing of the kind was seen.

    time_to_first, end_to_end: from when a request was due, so that one that had to wait to be sent is not
    counted as fast; the others with `sent` from when it was sent, as most benchmarks report them. per_token,
    between: without what came first. lag: between due and sent.
    """

    time_to_first: Distribution | None
    per_token: Distribution | None
    between: Distribution | None
    end_to_end: Distribution | None
    time_to_first_sent: Distribution | None
    end_to_end_sent: Distribution | None
    lag: Distribution | None


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that met every target (seconds by name): per second, and their share of all."""

    targets: dict[str, float]
    requests_per_second: float
    share: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a run; rates are over `seconds`, from the first request's due time to the last end.

    Tokens are of answered requests; total tokens are those that the server reports for prompts, and outputs.
    tokens_per_forward: output tokens over forwards, of the requests whose forwards are reported.
    errors: how many requests failed with which words.
    """

    num_requests: int
    num_failed: int
    errors: dict[str, int]
    seconds: float
    num_open_at_most: int
    requests_per_second: float
    output_tokens: int
    output_tokens_per_second: float
    total_tokens_per_second: float
    mean_nfe: float | None
    tokens_per_forward: float | None
    goodput: Goodput | None
    latencies: Latencies


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of numbers in rising order, interpolated between the two nearest."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def distribution(seconds: Sequence[float | None]) -> Distribution | None:
    """Return the distribution of what is there."""
    ordered = sorted(each for each in seconds if each is not None)
    if not ordered:
        return None
    median, p90, p95, p99 = (percentile(ordered, percent) for percent in (50, 90, 95, 99))
    return Distribution(
        count=len(ordered),
        mean=math.fsum(ordered) / len(ordered),
        median=median,
        p90=p90,
        p95=p95,
        p99=p99,
        max=ordered[-1],
    )


def summarize(records: Sequence[Record], targets: Mapping[str, float] | None = None) -> Summary:
    """Return the figures of a run; targets: seconds by the names of TARGETS."""
    good = [record for record in records if record.is_ok]
    seconds = max(record.ended for record in records) - min(record.due for record in records)
    output_tokens = sum(record.output_tokens or 0 for record in good)
    total_tokens = output_tokens + sum(record.prompt_tokens or 0 for record in good)
    counted = [record for record in good if record.nfe]
    num_forwards = sum(record.nfe or 0 for record in counted)
    counted_tokens = sum(record.output_tokens or 0 for record in counted)
    errors = Counter(record.error for record in records if record.error is not None)
    return Summary(
        num_requests=len(records),
        num_failed=len(records) - len(good),
        errors=dict(errors.most_common()),
        seconds=seconds,
        num_open_at_most=_most_open(records),
        requests_per_second=len(good) / seconds,
        output_tokens=output_tokens,
        output_tokens_per_second=output_tokens / seconds,
        total_tokens_per_second=total_tokens / seconds,
        mean_nfe=num_forwards / len(counted) if counted else None,
        tokens_per_forward=counted_tokens / num_forwards if counted_tokens else None,
        goodput=_goodput(records, targets, seconds) if targets else None,
        latencies=_latencies(good),
    )


def _latencies(records: Sequence[Record]) -> Latencies:
    return Latencies(
        time_to_first=distribution([record.time_to_first for record in records]),
        per_token=distribution([record.per_token for record in records]),
        between=distribution([gap for record in records for gap in record.gaps]),
        end_to_end=distribution([record.end_to_end for record in records]),
        time_to_first_sent=distribution(
            [record.chunks[0] - record.sent for record in records if record.chunks]
        ),
        end_to_end_sent=distribution([record.ended - record.sent for record in records]),
        lag=distribution([record.lag for record in records]),
    )


def _goodput(records: Sequence[Record], targets: Mapping[str, float], seconds: float) -> Goodput:
    num_good = sum(record.is_ok and meets(record, targets) for record in records)
    return Goodput(
        targets=dict(targets), requests_per_second=num_good / seconds, share=num_good / len(records)
    )


def meets(record: Record, targets: Mapping[str, float]) -> bool:
    """Whether a request stayed within every target; what it has none of (no second token) cannot be late."""
    took = {name: TARGETS[name](record) for name in targets}
    return all(seconds is None or seconds <= targets[name] for name, seconds in took.items())


def _most_open(records: Sequence[Record]) -> int:
    """Return how many requests were open at one time, at most; one that ends makes room at once."""
    changes = sorted([(record.sent, 1) for record in records] + [(record.ended, -1) for record in records])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
