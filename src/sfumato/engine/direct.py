"""A loop whose caller drives it step by step from the same thread: its inbox, its outbox, its steps."""

from __future__ import annotations

import itertools
from collections import deque

from sfumato.core.messages import Abort, Message, StepStats, Stop, Submit, Turn
from sfumato.core.request import Request
from sfumato.engine.loop import EngineLoop
from sfumato.errors import EngineError, RequestError

_KEPT_STEPS = 10_000
# A caller gets its thread back this soon where nothing can run until somebody else has done something.
_WAIT_SECONDS = 0.02


class DirectInbox:
    """Messages from the same thread."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()

    def put(self, message: Message) -> None:
        """Queue a message for the next turn."""
        self._messages.append(message)

    is_called = False

    def filenos(self) -> tuple[int, ...]:
        """Nobody else adds messages."""
        return ()

    def drain(self, *, wait_seconds: float | None) -> list[Message]:
        """Return what is queued; nobody else could add to it while this thread waits."""
        messages = list(self._messages)
        self._messages.clear()
        return messages


class DirectOutbox:
    """Turns for the same thread."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []

    def send(self, turn: Turn) -> None:
        """Keep a turn until it is taken."""
        self._turns.append(turn)

    def take(self) -> list[Turn]:
        """Return the turns since the last call."""
        turns, self._turns = self._turns, []
        return turns


class SteppedEngine:
    """A loop that its caller drives from one thread; what engines of text and of images have in common.

    steps: the last ones only, since a long run must not grow.
    """

    def __init__(self, loop: EngineLoop, inbox: DirectInbox, outbox: DirectOutbox) -> None:
        self.steps: deque[StepStats] = deque(maxlen=_KEPT_STEPS)
        self._loop = loop
        self._inbox = inbox
        self._outbox = outbox
        self._ids = itertools.count()
        self._pending: set[str] = set()

    @property
    def loop(self) -> EngineLoop:
        """Return the loop, for those who look inside."""
        return self._loop

    def claim(self, request_id: str | None) -> str:
        """Return the id of a new request. Raises RequestError for one that is active."""
        request_id = request_id if request_id is not None else f"request-{next(self._ids)}"
        if request_id in self._loop.live or request_id in self._pending:
            raise RequestError(
                f"request id {request_id!r} is already active", field="request_id", value=request_id
            )
        return request_id

    def submit(self, submission: Submit) -> str:
        """Queue a request for the next step and return its id."""
        self._pending.add(submission.request_id)
        self._inbox.put(submission)
        return submission.request_id

    def abort(self, request_id: str) -> None:
        """End a request at the next step; an unknown id is ignored."""
        self._inbox.put(Abort(request_id=request_id))

    def request(self, request_id: str) -> Request | None:
        """Return a live request."""
        return self._loop.live.get(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._loop.live or self._pending)

    def step(self) -> list[Turn]:
        """Run one turn of the loop and return what it brought."""
        if not self._loop.is_alive:
            raise EngineError("the engine was closed")
        # Only peers, and what runs beside the steps, could bring something while this thread sleeps.
        wait = self._loop.may_wait()
        self._loop.turn(wait_seconds=_WAIT_SECONDS if wait is None else min(wait, _WAIT_SECONDS))
        self._pending.clear()
        turns = self._outbox.take()
        for turn in turns:
            self.steps.extend(turn.steps)
        return turns

    def close(self) -> None:
        """End every request and the loop."""
        if self._loop.is_alive:
            self._inbox.put(Stop(drain=False))
            self._loop.turn()
            self._loop.handover.close()
