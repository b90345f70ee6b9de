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
from typing import Any

from sfumato.core.plan import ALL_KINDS, RowKind, StepPlan, StepResult
from sfumato.core.protocols import Runner, Sync
from sfumato.core.recording import UNRECORDED, Recorder
from sfumato.core.request import Request
from sfumato.engine.ahead import Ahead
from sfumato.engine.launches import Finished, outcomes_of, resolved


class Lane:
    """Launches plans on one runner. depth 0: launch, then collect; depth 1: collect while the next one runs.

    A forward that was agreed on with other ranks is made although nothing may be left to run in it.

    prepare: called once in the worker thread. kinds: of the rows that it runs. is_beside: no step waits for
    its launches, and its plan is made when the one before is done; but what is_short says of is run at once.
    ahead: at depth 1 a launch begins before the outcome of the one before is read; else behind it.
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
        ahead: Ahead[Any] | None = None,
        recorder: Recorder = UNRECORDED,
    ) -> None:
        self.kinds = kinds
        self.is_beside = is_beside
        self._is_short = is_short
        self._ahead = ahead
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
        future: Future[Finished] = Future()
        if not self.depth or (self.is_beside and self._is_short(plan)):
            started = time.perf_counter()
            future.set_result(self._run(plan, requests))
            self._launched.append((requests, future))
            if self.is_beside:
                self.waited_seconds += time.perf_counter() - started
            return
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "lane", initializer=self._prepare)
        if self._ahead is None:
            self._launched.append((requests, self._worker.submit(self._run, plan, requests)))
            return
        self._launched.append((requests, future))
        self._worker.submit(self._ahead.run, plan, requests, future)

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
        if self._launched and not allowed and self._ahead is not None and self._worker is not None:
            self._worker.submit(self._ahead.flush)
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
        idle_seconds, current = started - self._free_since, resolved(plan, requests)
        result = StepResult(launch_id=plan.launch_id, rows=())
        if current.forward or self.sync.is_shared:
            result = self.runner.launch(current, requests)
        with self._recorder.region("advance"):
            outcomes = outcomes_of(result, requests)
        self._free_since = time.perf_counter()
        return Finished(plan, requests, result, outcomes, idle_seconds, self._free_since - started)
