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
    Watch,
)
from sfumato.core.plan import RowResult, StepPlan, shares_of
from sfumato.core.protocols import Inbox, Outbox, WorkFactory
from sfumato.core.request import Progress, Request, Status, Work
from sfumato.engine.lane import Lane
from sfumato.engine.launches import Finished, Outcome
from sfumato.engine.scheduler import Scheduler
from sfumato.errors import EngineError, RequestError

# Where nothing can run until a peer has let go of pages, the loop looks again this soon.
_STUCK_SECONDS = 0.02
# Requests that a watched step names; an operator's screen has no place for more.
_MAX_SHARES = 64
# With only launches beside the steps in flight, messages are looked for this often.
_BESIDE_SECONDS = 0.01


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
        self.is_watched = False
        self._is_draining = False
        self._is_stuck = False
        self._num_arrived = 0
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
        if any(lane.is_busy or not lane.sync.may_wait for lane in self.lanes):
            return 0.0
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
        self._is_stuck = self.handover.wait_seconds() is not None
        for lane in self.lanes:
            if not lane.is_full:
                self._launch(lane)
            self._is_stuck = self._is_stuck and not lane.is_busy
            if lane.is_beside:
                # What a stage has made by now takes its step in this turn, and pictures do not wait for that.
                for finished in lane.collect():
                    started = self._conclude(lane, finished, started)
                if self._outputs:
                    self.flush()
        for lane, finished in self.collect():
            started = self._conclude(lane, finished, started)
        self.handover.send(self.leaving(), self)
        if self._is_draining and not self.live and all(lane.sync.may_leave for lane in self.lanes):
            self.is_alive = False
        if not self.is_alive:
            self._settle()
        self.flush()

    def _launch(self, lane: Lane) -> None:
        """Launch what is planned on a lane, or what peers need."""
        plan = lane.sync.agree(
            StepPlan(launch_id=-1) if self.is_paused else self.scheduler.plan(self.live, lane.kinds),
            num_arrived=self._arrivals(),
            is_leaving=self._is_draining and not self.live,
        )
        if plan.forward:
            self._note_start(plan)
            lane.launch(plan, self.live)

    def _conclude(self, lane: Lane, finished: Finished, since: float) -> float:
        """Apply and count a launch that has ended; since and return: see `_count`."""
        self.apply(finished)
        if finished.result.rows:
            self.scheduler.note_step(finished.plan, finished.step_seconds)
        return self._count(lane, finished, since)

    def _arrivals(self) -> int:
        """Return how many requests have come with their keys and values since the last turn."""
        before, self._num_arrived = self._num_arrived, self.handover.tally().arrived
        return self._num_arrived - before

    @property
    def is_closing(self) -> bool:
        """Whether the loop ends as soon as nothing is live."""
        return self._is_draining

    def leaving(self) -> list[Request]:
        """Return the running requests whose next rows are not this process's to run."""
        return [request for request in self.live.values() if self.handover.takes(request)]

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
            case Watch():
                self.is_watched = message.is_on
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
        request = self.enter(request_id, work)
        request.priority = message.priority
        request.deadline = None if message.timeout is None else request.arrived_at + message.timeout

    def enter(self, request_id: str, work: Work) -> Request:
        """Take a request in, from a client or from a peer; its id is checked by then."""
        now = self.clock()
        request = self.live[request_id] = Request(
            id=request_id,
            work=work,
            standing=work.standing(request_id),
            usage=work.usage(),
            arrival=self.num_accepted,
            arrived_at=now,
            waiting_since=now,
        )
        self.num_accepted += 1
        return request

    def leave(self, request_id: str) -> None:
        """End a request whose outputs come from elsewhere; an unknown id is nobody's."""
        request = self.live.pop(request_id, None)
        if request is not None:
            request.status = Status.ENDED
            self._release(request)
            self.num_ended += 1

    def advance(self, request: Request, results: list[RowResult]) -> None:
        """Let a request that was away take the results of rows that a peer ran."""
        progress = request.work.advance(results)
        request.status = Status.RUNNING
        self._take(request, Outcome(progress, request.work.standing(request.id), request.work.usage()))

    def _stop(self, *, drain: bool) -> None:
        self._is_draining = True
        self.is_paused = False
        if not drain:
            for request_id in list(self.live):
                self._end(request_id, FinishReason.ABORT)

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

    def collect(self) -> Iterator[tuple[Lane, Finished]]:
        """Yield finished launches, in order per lane; only with nothing else to do wait for those beside."""
        is_idle = not any(lane.is_busy and not lane.is_beside for lane in self.lanes)
        for lane in self.lanes:
            for finished in lane.collect(wait_seconds=_BESIDE_SECONDS if is_idle else 0.0):
                yield lane, finished

    def apply(self, finished: Finished) -> None:
        """Give each request its outcome; one that failed or was ended meanwhile concerns nobody else."""
        if finished.result.launch_id != finished.plan.launch_id:
            raise EngineError(
                f"the result of launch {finished.result.launch_id} came for launch {finished.plan.launch_id}"
            )
        for request_id, request in finished.requests.items():
            request.in_flight.pop(0)
            if self.live.get(request_id) is not request:
                # It ended while this was in flight: the outcome is nobody's, its pages can go now.
                self._release(request)
            elif request_id in finished.outcomes:
                self._take(request, finished.outcomes[request_id])

    def _take(self, request: Request, outcome: Outcome) -> None:
        request.usage = outcome.usage
        if outcome.error is not None:
            self._end(request.id, FinishReason.ERROR, error=f"request {request.id}: {outcome.error}")
            return
        has_grown = outcome.standing.cached_len > request.standing.cached_len
        request.standing, progress = outcome.standing, outcome.progress
        if has_grown:
            self.scheduler.share(request)
        if progress.finish_reason is not None:
            self._end(request.id, progress.finish_reason, progress=progress)
        elif progress.is_news:
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
        self._release(request)
        self.num_ended += 1
        self._outputs.append(_output(request, progress or Progress(finish_reason=reason), reason, error))

    def _release(self, request: Request) -> None:
        """Give an ended request's pages back, once no launch in flight reads or writes them."""
        if request.in_flight or request.lease is None:
            return
        if request.error is None:
            # What could not be shared while launches were in flight.
            self.scheduler.share(request)
        self.scheduler.release(request)

    def _settle(self) -> None:
        """Wait for what is in flight before the loop ends, and end the lanes."""
        for lane in self.lanes:
            while lane.is_busy:
                for finished in lane.collect(wait_seconds=_BESIDE_SECONDS):
                    self.apply(finished)
            lane.close()

    def _count(self, lane: Lane, finished: Finished, since: float) -> float:
        """Note a step's numbers; since: the end of the one before, or the turn's start. Return its end."""
        now = time.perf_counter()
        plan, device_seconds = finished.plan, finished.result.device_seconds
        waited, lane.waited_seconds = lane.waited_seconds, 0.0
        host_seconds = max(0.0, now - since - (waited if lane.depth else device_seconds))
        self._steps.append(
            StepStats(
                launch_id=plan.launch_id,
                kind=plan.kind,
                rows=len(finished.result.rows),
                tokens=sum(row.row.cost.tokens for row in finished.result.rows),
                host_seconds=host_seconds,
                device_seconds=device_seconds,
                hidden_seconds=max(0.0, host_seconds - finished.idle_seconds) if lane.depth else 0.0,
                wasted_rows=finished.num_wasted,
                shares=shares_of(finished.result, _MAX_SHARES) if self.is_watched else (),
            )
        )
        return now

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
        step=progress.step,
        pictures=progress.pictures,
        usage=request.usage,
        finish_reason=reason,
        error=error,
        queue_seconds=queued,
    )
