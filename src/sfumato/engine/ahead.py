"""Launches that begin before the outcome of the one before is read: the device never waits for the host.

Rows whose request is in the launch before go on from what the device has of them, where its runner can say
what they are; the others wait for the next launch. A step that turns out to have run on a finished block has
changed nothing; for exact caches it was the forward that writes the block's last keys.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from msgspec.structs import replace

from sfumato.core.plan import Row, StepPlan, StepResult
from sfumato.core.recording import UNRECORDED, Recorder
from sfumato.core.request import Request
from sfumato.engine.launches import Finished, is_over, outcomes_of, resolved, rows_now
from sfumato.errors import EngineError


class Begun(Protocol):
    """A launch whose outcome is not read."""

    def rows_behind(self, request: Request, known: tuple[Row, ...], *, is_guess: bool) -> tuple[Row, ...]:
        """Return the rows of a request that may begin now; () for none."""
        ...


_B = TypeVar("_B", bound=Begun)


class AheadRunner(Protocol[_B]):
    """Runs launches in two halves."""

    def begin(self, plan: StepPlan, live: Mapping[str, Request], behind: _B | None = None) -> _B: ...

    def finish(self, begun: _B) -> StepResult: ...

    def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class _Pending(Generic[_B]):
    begun: _B
    plan: StepPlan
    requests: Mapping[str, Request]
    future: Future[Finished]
    idle_seconds: float


class Ahead(Generic[_B]):
    """Keeps one launch whose outcome is not read; used in a lane's worker thread alone."""

    def __init__(self, runner: AheadRunner[_B], recorder: Recorder = UNRECORDED) -> None:
        self._runner = runner
        self._recorder = recorder
        self._pending: _Pending[_B] | None = None
        self._free_since = time.perf_counter()

    def run(self, plan: StepPlan, requests: Mapping[str, Request], future: Future[Finished]) -> None:
        """Begin what a plan has come to, then read the outcome of the launch before."""
        try:
            with self._recorder.step(plan):
                self._run(plan, requests, future)
        except BaseException as error:
            # An error of the engine: the loop raises it where it collects.
            if not future.done():
                future.set_exception(error)

    def _run(self, plan: StepPlan, requests: Mapping[str, Request], future: Future[Finished]) -> None:
        current = self._behind(plan, requests)
        if not current.forward:
            self.flush()
            current = resolved(plan, requests)
        idle_seconds = 0.0 if self._pending else time.perf_counter() - self._free_since
        if not current.forward:
            nothing = StepResult(launch_id=plan.launch_id, rows=())
            future.set_result(Finished(plan, requests, nothing, {}, idle_seconds))
            return
        try:
            behind = None if self._pending is None else self._pending.begun
            begun = self._runner.begin(current, requests, behind)
        except (EngineError, KeyboardInterrupt):
            raise
        except Exception:
            self._run_apart(plan, requests, future)
            return
        self.flush()
        self._pending = _Pending(begun, plan, requests, future, idle_seconds)

    def _behind(self, plan: StepPlan, requests: Mapping[str, Request]) -> StepPlan:
        """Return the plan with the rows that may begin although the launch before is not read."""
        pending = self._pending
        if pending is None:
            return resolved(plan, requests)
        rows: list[Row] = []
        for request_id, planned in plan.by_request().items():
            request, is_guess = requests[request_id], request_id in plan.guesses
            if is_over(request):
                continue
            known = rows_now(request, planned) if is_guess else planned
            if pending.requests.get(request_id) is request:
                known = pending.begun.rows_behind(request, known, is_guess=is_guess)
            rows += known
        return replace(plan, rows=tuple(rows), guesses=frozenset())

    def _run_apart(self, plan: StepPlan, requests: Mapping[str, Request], future: Future[Finished]) -> None:
        """Run a launch that raised behind the outcome of the one before, to find the request at fault."""
        self.flush()
        result = self._runner.launch(resolved(plan, requests), requests)
        future.set_result(Finished(plan, requests, result, outcomes_of(result, requests)))
        self._free_since = time.perf_counter()

    def flush(self) -> None:
        """Read the outcome that is still to be read."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            result = self._runner.finish(pending.begun)
            with self._recorder.region("advance"):
                outcomes = outcomes_of(result, pending.requests)
        except BaseException as error:
            pending.future.set_exception(error)
            raise
        self._free_since = time.perf_counter()
        pending.future.set_result(
            Finished(pending.plan, pending.requests, result, outcomes, pending.idle_seconds)
        )
