"""What a launch comes to: the rows that still run when it begins, and what it brings to each request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from sfumato.core.messages import Usage
from sfumato.core.plan import Row, RowResult, StepPlan, StepResult
from sfumato.core.request import Progress, Request, Standing, Status


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a launch brought to one request; an error ends it."""

    progress: Progress
    standing: Standing
    usage: Usage
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A launch whose outcome is known.

    plan: as it was planned. result: of the rows that ran. outcomes: by request id; one that had ended before
    its rows could run has none. idle_seconds: for how long the lane had nothing to run before. own_seconds:
    from its beginning until each request had taken its results, None where that overlaps with another launch.
    """

    plan: StepPlan
    requests: Mapping[str, Request]
    result: StepResult
    outcomes: Mapping[str, Outcome]
    idle_seconds: float = 0.0
    own_seconds: float | None = None

    @property
    def step_seconds(self) -> float:
        """Return what the step has taken of the lane's time: what each request does alone is part of it."""
        return self.result.device_seconds if self.own_seconds is None else self.own_seconds

    @property
    def num_wasted(self) -> int:
        """Return how many requests were planned and had nothing left to run, or ran on a finished block."""
        return len(self.requests) - len(self.outcomes) + self.result.num_past


def resolved(plan: StepPlan, requests: Mapping[str, Request]) -> StepPlan:
    """Return the plan with the rows that guesses have come to; what has ended meanwhile runs no more."""
    if not plan.guesses and not any(is_over(request) for request in requests.values()):
        return plan
    rows: list[Row] = []
    for request_id, planned in plan.by_request().items():
        if not is_over(requests[request_id]):
            rows += rows_now(requests[request_id], planned) if request_id in plan.guesses else planned
    return replace(plan, rows=tuple(rows), guesses=frozenset())


def rows_now(request: Request, planned: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return what a guess has come to; one that needs more pages than it holds waits for the next plan."""
    standing = request.work.standing(request.id)
    rows = standing.rows(sum(row.cost.tokens for row in planned))
    has_room = standing.pages_for(rows) <= (len(request.lease.pages) if request.lease else 0)
    return rows if has_room else ()


def is_over(request: Request) -> bool:
    """Whether nothing more of it runs."""
    return request.is_over or request.status is Status.ENDED


def outcomes_of(result: StepResult, requests: Mapping[str, Request]) -> dict[str, Outcome]:
    """Let the work of each request take its results; one that is over takes none."""
    found: dict[str, list[RowResult]] = {}
    for row in result.rows:
        found.setdefault(row.row.request_id, []).append(row)
    return {
        request_id: _advance(requests[request_id], rows)
        for request_id, rows in found.items()
        if not requests[request_id].is_over
    }


def _advance(request: Request, rows: list[RowResult]) -> Outcome:
    """Give a request its results; after an error or its end nothing more of it runs."""
    work = request.work
    errors = [row.error for row in rows if row.error is not None]
    progress = Progress() if errors else work.advance(rows)
    request.is_over = bool(errors) or progress.finish_reason is not None
    return Outcome(progress, work.standing(request.id), work.usage(), errors[0] if errors else None)
