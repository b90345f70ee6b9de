"""A stream of launches that keeps its own order: launched at once, or one step ahead of what is known.

At depth 1 a worker thread runs the forwards while the loop plans, streams and takes messages in. The work of
a request then advances in that thread, right behind its forward, and the next launch begins from there; the
loop sees the outcome one step later, and plans on what it knew before. Launches of a lane never overtake one
another.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from msgspec.structs import replace

from sfumato.core.messages import Usage
from sfumato.core.plan import ALL_KINDS, Row, RowKind, RowResult, StepPlan, StepResult
from sfumato.core.protocols import Runner, Sync
from sfumato.core.recording import UNRECORDED, Recorder
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
    its rows could run has none. idle_seconds: for how long the lane had nothing to run before.
    """

    plan: StepPlan
    requests: Mapping[str, Request]
    result: StepResult
    outcomes: Mapping[str, Outcome]
    idle_seconds: float = 0.0

    @property
    def num_wasted(self) -> int:
        """Return how many requests were planned and had nothing left to run."""
        return len(self.requests) - len(self.outcomes)


class Lane:
    """Launches plans on one runner. depth 0: launch, then collect; depth 1: collect while the next one runs.

    A forward that was agreed on with other ranks is made although nothing may be left to run in it.

    prepare: called once in the worker thread. kinds: of the rows that it runs. is_beside: no step waits for
    its launches, and its plan is made when the one before is done; but what is_short says of is run at once.
    waited_seconds: that the loop has spent waiting here.
    """

    def __init__(
        self,
        runner: Runner,
        sync: Sync,
        *,
        depth: int = 0,
        prepare: Callable[[], None] | None = None,
        kinds: frozenset[RowKind] = ALL_KINDS,
        is_beside: bool = False,
        is_short: Callable[[StepPlan], bool] = lambda plan: False,
        recorder: Recorder = UNRECORDED,
    ) -> None:
        self.kinds = kinds
        self.is_beside = is_beside
        self._is_short = is_short
        self._recorder = recorder
        self.runner = runner
        self.sync = sync
        self.depth = depth
        self.waited_seconds = 0.0
        self._worker: ThreadPoolExecutor | None = None
        self._prepare = prepare
        self._launched: deque[tuple[Mapping[str, Request], Future[Finished]]] = deque()
        self._has_launched = False
        self._free_since = time.perf_counter()

    @property
    def is_busy(self) -> bool:
        """Whether a launch has not been collected."""
        return bool(self._launched)

    @property
    def is_full(self) -> bool:
        """Whether a further plan would only wait here."""
        return self.is_beside and self.is_busy

    def requests(self) -> Iterator[Request]:
        """Yield the requests of each launch in flight."""
        for requests, _ in self._launched:
            yield from requests.values()

    def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> None:
        """Run a plan, or queue it behind the one that runs."""
        rows = plan.by_request()
        requests = {request_id: live[request_id] for request_id in rows}
        for request_id, request in requests.items():
            request.in_flight.append(rows[request_id])
        self._has_launched = True
        if not self.depth or (self.is_beside and self._is_short(plan)):
            started = time.perf_counter()
            future: Future[Finished] = Future()
            future.set_result(self._run(plan, requests))
            self._launched.append((requests, future))
            if self.is_beside:
                self.waited_seconds += time.perf_counter() - started
            return
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "lane", initializer=self._prepare)
        self._launched.append((requests, self._worker.submit(self._run, plan, requests)))

    def collect(self, *, wait_seconds: float = 0.0) -> Iterator[Finished]:
        """Yield outcomes in launch order; wait for those that more than `depth` launches have overtaken.

        With nothing launched since the last call nothing else is there to be done: wait for all. Beside the
        others wait only so long for the first.
        """
        if self.is_beside:
            if self._launched and wait_seconds:
                wait([self._launched[0][1]], timeout=wait_seconds)
            while self._launched and self._launched[0][1].done():
                yield self._launched.popleft()[1].result()
            return
        allowed = self.depth if self._has_launched else 0
        self._has_launched = False
        while self._launched and (len(self._launched) > allowed or self._launched[0][1].done()):
            started = time.perf_counter()
            finished = self._launched.popleft()[1].result()
            self.waited_seconds += time.perf_counter() - started
            yield finished

    def close(self) -> None:
        """End the worker; what was launched has been collected."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    def _run(self, plan: StepPlan, requests: Mapping[str, Request]) -> Finished:
        """Run what a plan has come to by now, and let each request take its results."""
        with self._recorder.step(plan):
            return self._step(plan, requests)

    def _step(self, plan: StepPlan, requests: Mapping[str, Request]) -> Finished:
        started = time.perf_counter()
        idle_seconds, resolved = started - self._free_since, _resolved(plan, requests)
        result = StepResult(launch_id=plan.launch_id, rows=())
        if resolved.forward or self.sync.is_shared:
            result = self.runner.launch(resolved, requests)
        with self._recorder.region("advance"):
            outcomes = {
                request_id: _advance(requests[request_id], rows) for request_id, rows in _by_request(result)
            }
        self._free_since = time.perf_counter()
        return Finished(plan, requests, result, outcomes, idle_seconds)


def _resolved(plan: StepPlan, requests: Mapping[str, Request]) -> StepPlan:
    """Return the plan with the rows that guesses have come to; what has ended meanwhile runs no more.

    A request whose next step needs more pages than it holds waits for the next plan.
    """
    if not plan.guesses and not any(_is_over(request) for request in requests.values()):
        return plan
    rows: list[Row] = []
    for request_id, planned in plan.by_request().items():
        request = requests[request_id]
        if _is_over(request):
            continue
        if request_id not in plan.guesses:
            rows += planned
            continue
        standing = request.work.standing(request_id)
        now = standing.rows(sum(row.cost.tokens for row in planned))
        if standing.pages_for(now) <= (len(request.lease.pages) if request.lease else 0):
            rows += now
    return replace(plan, rows=tuple(rows), guesses=frozenset())


def _is_over(request: Request) -> bool:
    return request.is_over or request.status is Status.ENDED


def _by_request(result: StepResult) -> Iterator[tuple[str, list[RowResult]]]:
    found: dict[str, list[RowResult]] = {}
    for row in result.rows:
        found.setdefault(row.row.request_id, []).append(row)
    yield from found.items()


def _advance(request: Request, rows: list[RowResult]) -> Outcome:
    """Give a request its results; after an error or its end nothing more of it runs."""
    work = request.work
    errors = [row.error for row in rows if row.error is not None]
    progress = Progress() if errors else work.advance(rows)
    request.is_over = bool(errors) or progress.finish_reason is not None
    return Outcome(progress, work.standing(request.id), work.usage(), errors[0] if errors else None)
