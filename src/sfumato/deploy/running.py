"""One request over the replicas that it runs on, until it has ended: sent, lost, sent again."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec.structs import replace

from sfumato.core.messages import FinishReason, Output, Refusal, Submit
from sfumato.deploy.desk import Desk
from sfumato.deploy.quarantine import Quarantine
from sfumato.deploy.ticket import Hints, Ticket
from sfumato.deploy.tracing import Span, Tracer
from sfumato.engine.attempts import Attempts
from sfumato.errors import EngineDied, EngineError, RequestError

_GRACE_SECONDS = 1.0
# Between two attempts of which the first did not begin: what is wrong may take a moment to be noticed.
_PAUSE_SECONDS = 0.2

_log = logging.getLogger("sfumato.deploy")


class Call(Protocol):
    """A call to a replica through Ray: it lasts as long as the request runs there."""

    def __await__(self) -> Generator[Any, None, Any]: ...

    def cancel(self) -> None:
        """End it."""
        ...


@dataclass(frozen=True, slots=True)
class Patience:
    """How long and how often a request is tried.

    claim_seconds: after so long it is asked why no replica has claimed a request.
    wait_seconds: in which a replica must have been found, over all attempts.
    """

    claim_seconds: float = 5.0
    wait_seconds: float = 120.0


@dataclass(frozen=True, slots=True)
class Sending:
    """How requests of one model reach its replicas."""

    desk: Desk
    tracer: Tracer
    dispatch: Callable[[Ticket], Call]
    quarantine: Quarantine
    patience: Patience


@dataclass(frozen=True, slots=True)
class _End:
    """How an attempt ended. kind: ended, killed (its engine died), moved (it is lost otherwise)."""

    kind: str
    message: str = ""


class Running:
    """One request until its end; accepted: done once an engine has taken it, or it has failed before.

    put: takes its outputs, each token once. hint: tells what a router should know of a submission.
    on_retry: called when it has lost its engine and is to go on elsewhere.
    """

    def __init__(
        self,
        submission: Submit,
        put: Callable[[Output], None],
        hint: Callable[[Submit], Hints],
        sending: Sending,
        on_retry: Callable[[], None],
    ) -> None:
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._id = submission.request_id
        self._submission = submission
        self._attempts = Attempts(submission)
        self._put = put
        self._hint = hint
        self._sending = sending
        self._on_retry = on_retry
        self._trace = sending.tracer.parent()
        self._num_attempts = 0
        self._num_expected = 0
        self._waited_seconds = 0.0
        self._sent_at = 0.0
        self._replica: str | None = None
        self._is_begun = False
        # Replicas that have lost it.
        self._left: frozenset[str] = frozenset()
        self._end: asyncio.Future[_End] | None = None

    async def drive(self) -> None:
        """Run to the end; every failure becomes the request's own."""
        try:
            with self._sending.tracer.span("request", self._id, self._trace) as span:
                self._trace = self._sending.tracer.parent()
                await self._drive(span)
        except TimeoutError:
            self._accept()
            self._put(Output(request_id=self._id, finish_reason=FinishReason.TIMEOUT))
        except EngineError as error:
            # That nobody is there is told at the door; what comes of having run is the request's own end.
            if isinstance(error, EngineDied) and not self.accepted.done():
                self.accepted.set_exception(error)
                return
            self._accept()
            self._put(self._attempts.failed(error))

    async def _drive(self, span: Span) -> None:
        while True:
            self._submission = self._attempts.again()
            left = self._attempts.seconds_left
            # A replica ends a request that is out of time; one that cannot gets a little more.
            async with asyncio.timeout(None if left is None else left + _GRACE_SECONDS):
                end = await self._try()
            if end.kind == "ended":
                return
            place = "no replica" if self._replica is None else f"replica {self._replica}"
            _log.warning("request %s: attempt %d on %s: %s", self._id, self._num_attempts, place, end.message)
            span.add_event("lost", {"replica": self._replica or "", "reason": end.message})
            if self._replica is not None:
                self._left |= {self._replica}
            if self._is_begun:
                self._attempts.lose(is_blamed=end.kind == "killed")
                self._on_retry()
            else:
                await asyncio.sleep(_PAUSE_SECONDS)
                self._note_waited()

    async def _try(self) -> _End:
        quarantine = self._sending.quarantine
        if not self._attempts.is_suspect:
            return await self._attempt(frozenset())
        taken = await quarantine.enter(self._id)
        try:
            return await self._attempt(taken)
        finally:
            quarantine.leave(self._id)

    async def _attempt(self, avoid: frozenset[str]) -> _End:
        """Send the request to a replica of the router's choice and wait until it has ended there."""
        desk, patience = self._sending.desk, self._sending.patience
        self._num_attempts += 1
        self._num_expected, self._replica, self._is_begun = 0, None, False
        end: asyncio.Future[_End] = asyncio.get_running_loop().create_future()
        self._end = end
        hints = self._hint(self._submission)
        hints.avoid = avoid | self._left | frozenset(desk.unable)
        ticket = Ticket(secrets.token_hex(8), desk.front, self._trace, hints)
        desk.open(ticket.id, self)
        self._sent_at = time.monotonic()
        call = self._sending.dispatch(ticket)
        watching = asyncio.create_task(self._watch(call, end))
        try:
            while not end.done() and self._replica is None:
                await asyncio.wait({end}, timeout=patience.claim_seconds)
                if self._replica is None and self._is_stuck(hints):
                    self._settle("moved", f"nobody asked for it within {patience.claim_seconds:g} s")
            return await end
        finally:
            self._end = None
            desk.drop(ticket.id)
            if self._replica is None:
                # It may wait at the router, or in front of a replica that stands still.
                call.cancel()
            watching.cancel()

    def _is_stuck(self, hints: Hints) -> bool:
        """Whether a request that nobody has claimed waits in vain, and not for room at its replicas."""
        seconds = self._waited_seconds + time.monotonic() - self._sent_at
        if not hints.chosen or seconds >= self._sending.patience.wait_seconds:
            return True
        return any(name in self._sending.desk.unable for name in hints.chosen)

    def _note_waited(self) -> None:
        """Count the time without a replica. Raises EngineDied where that was too long."""
        self._waited_seconds += time.monotonic() - self._sent_at
        if self._waited_seconds >= self._sending.patience.wait_seconds:
            raise EngineDied(
                f"no replica took request {self._id!r} within {self._waited_seconds:.0f} seconds"
            )

    async def _watch(self, call: Awaitable[Any], end: asyncio.Future[_End]) -> None:
        """Take the end of the call for that of the replica, unless the replica itself has said more."""
        try:
            await call
        except Exception as error:  # whatever Ray raises: the call does not last any more
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            message = f"{type(error).__name__}: {reason}"
        else:
            # Its last output may still be on its way.
            await asyncio.wait({end}, timeout=self._sending.patience.claim_seconds)
            message = "its end did not come"
        if not end.done():
            end.set_result(_End("moved", message))

    def _settle(self, kind: str, message: str = "") -> None:
        if self._end is not None and not self._end.done():
            self._end.set_result(_End(kind, message))

    def _accept(self) -> None:
        if not self.accepted.done():
            self.accepted.set_result(None)

    def claim(self, replica: str) -> Submit:
        """Return what a replica shall run, with the time that is left and an id that is new to it."""
        self._replica = replica
        self._sending.quarantine.place(self._id, replica)
        _log.info("request %s: attempt %d on replica %s", self._id, self._num_attempts, replica)
        left = self._attempts.seconds_left
        timeout = None if left is None else max(0.001, left)
        suffix = "" if self._num_attempts == 1 else f"~{self._num_attempts}"
        return replace(self._submission, request_id=f"{self._id}{suffix}", timeout=timeout)

    def accept(self) -> None:
        """Take note that an engine has it."""
        self._is_begun = True
        self._accept()

    def refuse(self, refusal: Refusal) -> None:
        """End with the engine's refusal."""
        error = RequestError(refusal.message, field=refusal.field or "request")
        if not self.accepted.done():
            self.accepted.set_exception(error)
        else:
            self._put(Output(request_id=self._id, finish_reason=FinishReason.ERROR, error=str(error)))
        self._settle("ended")

    def take(self, number: int, output: Output) -> None:
        """Pass on what the client has not had yet; a gap makes this attempt worthless."""
        if self._end is None or self._end.done():
            return
        if number != self._num_expected:
            self._settle("moved", f"output {self._num_expected} did not arrive")
            return
        self._num_expected += 1
        fresh = self._attempts.take(replace(output, request_id=self._id))
        if not self._attempts.is_suspect:
            self._sending.quarantine.leave(self._id)
        if fresh is not None:
            self._put(fresh)
        if output.finish_reason is not None:
            self._settle("ended")

    def lose(self, message: str, *, has_killed: bool) -> None:
        """End this attempt: the replica or its engine is gone."""
        self._is_begun = self._is_begun or has_killed
        self._settle("killed" if has_killed else "moved", message)
