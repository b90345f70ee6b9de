"""The seams of the loop: where messages come from, where outputs go, what launches and what builds work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from sfumato.core.handover import PeerEvent
from sfumato.core.messages import Message, Turn
from sfumato.core.plan import StepPlan, StepResult
from sfumato.core.request import Request, Work
from sfumato.core.spec import Spec


class Inbox(Protocol):
    """Messages to the loop."""

    def filenos(self) -> Sequence[int]:
        """Return what becomes readable when a message comes; nothing where only this thread adds any."""
        ...

    @property
    def is_called(self) -> bool:
        """Whether another rank waits for this one's next turn, message or not."""
        ...

    def drain(self, *, wait_seconds: float | None) -> Iterable[Message | PeerEvent]:
        """Return all messages that are there.

        wait_seconds: 0 returns at once; a number waits that long for the first; None waits for ever.
        """
        ...


class Outbox(Protocol):
    """Where a turn's outputs go."""

    def send(self, turn: Turn) -> None:
        """Deliver one turn; never blocks the loop for long."""
        ...


class Runner(Protocol):
    """Executes plans."""

    def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult:
        """Run the rows of a plan; an error of one request is in its rows' results."""
        ...


class WorkFactory(Protocol):
    """Builds the work of a request, or refuses it at the door."""

    def __call__(self, request_id: str, spec: Spec) -> Work:
        """Return the work. Raises RequestError for what can never be served."""
        ...


class Sync(Protocol):
    """Agrees with data-parallel peers on this turn's forward.

    is_shared: peers wait for each forward that was agreed on. may_wait: nobody has anything to run, so that
    the loop may sleep. may_leave: nobody needs this one any more.
    """

    @property
    def is_shared(self) -> bool: ...

    @property
    def may_wait(self) -> bool: ...

    @property
    def may_leave(self) -> bool: ...

    def agree(self, plan: StepPlan, *, num_arrived: int = 0, is_leaving: bool = False) -> StepPlan:
        """Return the plan to run.

        num_arrived: requests that came with their keys and values. is_leaving: this one has been stopped and
        has nothing left to do.
        """
        ...
