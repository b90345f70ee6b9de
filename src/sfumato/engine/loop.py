"""The one event loop: advances every live request one step per turn until it is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import assert_never

from sfumato.core.handover import Handover, PeerEvent
from sfumato.core.messages import (
    Abort,
    FinishReason,
    Gauges,
    Message,
    Output,
    Pause,
    Ping,
    Refusal,
    Resume,
    StepStats,
    Stop,
    Submit,
    Turn,
)
from sfumato.core.plan import RowResult, StepPlan, StepResult
from sfumato.core.protocols import Inbox, Outbox, Runner, Sync, WorkFactory
from sfumato.core.request import Progress, Request, Status, Work
from sfumato.engine.scheduler import Scheduler
from sfumato.errors import EngineError, RequestError

# Where nothing can run until a peer has let go of pages, the loop looks again this soon.
_STUCK_SECONDS = 0.02


class Lane:
    """A stream of launches that keeps its own order; depth 0: launch, then collect."""

    def __init__(self, runner: Runner, sync: Sync) -> None:
        self.runner = runner
        self.sync = sync
        self._finished: list[tuple[StepPlan, StepResult]] = []

    def launch(self, plan: StepPlan, live: dict[str, Request]) -> None:
        """Run a plan."""
        self._finished.append((plan, self.runner.launch(plan, live)))

    def collect(self) -> list[tuple[StepPlan, StepResult]]:
        """Return the finished launches in order."""
        finished, self._finished = self._finished, []
        return finished


class EngineLoop:
    """Owns the live requests; every mode is an argument.

    handover: state and keys to and from peers, where this process runs only some kinds of rows.
    clock: monotonic seconds; deadlines and waiting times are on it.
    """

    def __init__(
        self,
        *,
        inbox: Inbox,
        outbox: Outbox,
        scheduler: Scheduler,
        lanes: tuple[Lane, ...],
        make_work: WorkFactory,
        gauges: Callable[[dict[str, Request]], Gauges],
        handover: Handover,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.inbox = inbox
        self.outbox = outbox
        self.scheduler = scheduler
        self.lanes = lanes
        self.make_work = make_work
        self.gauges = gauges
        self.handover = handover
        self.clock = clock
        self.live: dict[str, Request] = {}
        self.num_accepted = 0
        self.num_ended = 0
        self.is_alive = True
        self.is_paused = False
        self._is_draining = False
        self._is_stuck = False
        self._accepted: list[str] = []
        self._refusals: list[Refusal] = []
        self._outputs: list[Output] = []
        self._steps: list[StepStats] = []
        self._pongs: list[int] = []

    def run(self) -> None:
        """Advance every live request one step per turn until stopped."""
        while self.is_alive:
            self.turn(wait_seconds=self.may_wait())

    def may_wait(self) -> float | None:
        """Return how long the loop may sleep for a message: not at all while anything can run."""
        if not self.is_paused and any(request.status is not Status.AWAY for request in self.live.values()):
            return _STUCK_SECONDS if self._is_stuck else 0.0
        deadlines = [request.deadline for request in self.live.values() if request.deadline is not None]
        waits = [max(0.0, deadline - self.clock()) for deadline in deadlines]
        handover = self.handover.wait_seconds()
        return min(waits if handover is None else [*waits, handover], default=None)

    def turn(self, *, wait_seconds: float | None = 0.0) -> None:
        """Take messages in, plan, launch, apply and send: one step of every request that is chosen."""
        for message in self.inbox.drain(wait_seconds=wait_seconds):
            self.accept(message)
        started = time.perf_counter()
        self._expire()
        for lane in self.lanes:
            plan = lane.sync.agree(
                StepPlan(launch_id=-1) if self.is_paused else self.scheduler.plan(self.live)
            )
            self._is_stuck = not plan.forward and self.handover.wait_seconds() is not None
            if plan.forward:
                self._note_start(plan)
                lane.launch(plan, self.live)
        for plan, result in self.collect():
            self.apply(plan, result)
            self.scheduler.note_step(plan, result.device_seconds)
            self._count(plan, result, time.perf_counter() - started)
        self.handover.send(self.leaving(), self)
        if self._is_draining and not self.live:
            self.is_alive = False
        self.flush()

    @property
    def is_closing(self) -> bool:
        """Whether the loop ends as soon as nothing is live."""
        return self._is_draining

    def leaving(self) -> list[Request]:
        """Return the running requests whose next rows are not this process's to run."""
        return [
            request
            for request in self.live.values()
            if request.status is Status.RUNNING and self.handover.takes(request)
        ]

    def accept(self, message: Message | PeerEvent) -> None:
        """Act on one message."""
        match message:
            case Submit():
                self._submit(message)
            case Abort():
                self._end(message.request_id, FinishReason.ABORT)
            case Pause():
                self.is_paused = True
            case Resume():
                self.is_paused = False
            case Ping():
                self._pongs.append(message.token)
            case Stop():
                self._stop(drain=message.drain)
            case PeerEvent():
                self.handover.accept(message, self)
            case _:
                assert_never(message)

    def _submit(self, message: Submit) -> None:
        """Accept a request, or answer why not; a duplicate id is refused and the first goes on."""
        request_id = message.request_id
        if self._is_draining or not self.is_alive:
            reason = "the engine is shutting down and takes no new requests"
            self._refusals.append(Refusal(request_id=request_id, message=reason, is_final=False))
            return
        if request_id in self.live:
            reason = f"request id {request_id!r} is already active"
            self._refusals.append(Refusal(request_id=request_id, message=reason, field="request_id"))
            return
        try:
            work = self.make_work(request_id, message.spec)
        except RequestError as error:
            self._refusals.append(Refusal(request_id=request_id, message=str(error), field=error.field))
            return
        self._accepted.append(request_id)
        self.enter(request_id, work)
        request = self.live[request_id]
        request.priority = message.priority
        request.deadline = None if message.timeout is None else request.arrived_at + message.timeout

    def enter(self, request_id: str, work: Work) -> None:
        """Take a request in, from a client or from a peer; its id is checked by then."""
        now = self.clock()
        self.live[request_id] = Request(
            id=request_id, work=work, arrival=self.num_accepted, arrived_at=now, waiting_since=now
        )
        self.num_accepted += 1

    def leave(self, request_id: str) -> None:
        """End a request whose outputs come from elsewhere; an unknown id is nobody's."""
        request = self.live.pop(request_id, None)
        if request is not None:
            request.status = Status.ENDED
            self.scheduler.release(request)
            self.num_ended += 1

    def _stop(self, *, drain: bool) -> None:
        self._is_draining = True
        self.is_paused = False
        if not drain:
            for request_id in list(self.live):
                self._end(request_id, FinishReason.ABORT)
            self.is_alive = False

    def _expire(self) -> None:
        now = self.clock()
        late = [r.id for r in self.live.values() if r.deadline is not None and now >= r.deadline]
        for request_id in late:
            self._end(request_id, FinishReason.TIMEOUT)

    def _note_start(self, plan: StepPlan) -> None:
        for request_id in plan.request_ids():
            request = self.live[request_id]
            if request.started_at is None:
                request.started_at = self.clock()

    def collect(self) -> Iterator[tuple[StepPlan, StepResult]]:
        """Yield finished launches, in order per lane."""
        for lane in self.lanes:
            yield from lane.collect()

    def apply(self, plan: StepPlan, result: StepResult) -> None:
        """Give each request its results; one that failed or was ended meanwhile concerns nobody else."""
        if result.launch_id != plan.launch_id:
            raise EngineError(f"the result of launch {result.launch_id} came for launch {plan.launch_id}")
        by_request: dict[str, list[RowResult]] = {}
        for row in result.rows:
            by_request.setdefault(row.row.request_id, []).append(row)
        for request_id, rows in by_request.items():
            request = self.live.get(request_id)
            if request is None:
                continue
            errors = [row.error for row in rows if row.error is not None]
            if errors:
                self._end(request_id, FinishReason.ERROR, error=f"request {request_id}: {errors[0]}")
                continue
            cached_len = request.work.cached_len()
            progress = request.work.advance(rows)
            if request.work.cached_len() > cached_len:
                self.scheduler.share(request)
            if progress.finish_reason is not None:
                self._end(request_id, progress.finish_reason, progress=progress)
            elif progress.token_ids or progress.canvas is not None:
                self._outputs.append(_output(request, progress))

    def _end(
        self,
        request_id: str,
        reason: FinishReason,
        *,
        progress: Progress | None = None,
        error: str | None = None,
    ) -> None:
        """End a live request once: status, pages and one terminal output; an unknown id is nobody's."""
        request = self.live.pop(request_id, None)
        if request is None:
            return
        request.status = Status.ENDED
        request.finish_reason = reason
        request.error = error
        self.handover.let_go(request, error or reason.value)
        self.scheduler.release(request)
        self.num_ended += 1
        self._outputs.append(_output(request, progress or Progress(finish_reason=reason), reason, error))

    def _count(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        self._steps.append(
            StepStats(
                launch_id=plan.launch_id,
                kind=plan.kind,
                rows=len(plan.rows),
                tokens=sum(row.cost.tokens for row in plan.rows),
                host_seconds=max(0.0, seconds - result.device_seconds),
                device_seconds=result.device_seconds,
            )
        )

    def flush(self) -> None:
        """Send what this turn brought, if anything."""
        has_news = self._accepted or self._refusals or self._outputs or self._steps or self._pongs
        if not has_news and self.is_alive:
            return
        turn = Turn(
            accepted=tuple(self._accepted),
            refusals=tuple(self._refusals),
            outputs=tuple(self._outputs),
            steps=tuple(self._steps),
            gauges=self.gauges(self.live),
            pongs=tuple(self._pongs),
            stopped=not self.is_alive,
        )
        self._accepted, self._refusals, self._outputs, self._steps, self._pongs = [], [], [], [], []
        self.outbox.send(turn)


def _output(
    request: Request, progress: Progress, reason: FinishReason | None = None, error: str | None = None
) -> Output:
    queued = None if request.started_at is None else request.started_at - request.arrived_at
    return Output(
        request_id=request.id,
        token_ids=progress.token_ids,
        logprobs=progress.logprobs,
        canvas=progress.canvas,
        score=progress.score,
        usage=request.work.usage(),
        finish_reason=reason,
        error=error,
        queue_seconds=queued,
    )
