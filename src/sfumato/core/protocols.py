"""The seams of the loop: where messages come from, where outputs go, what launches and what builds work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from sfumato.core.handover import PeerEvent
from sfumato.core.messages import Message, Turn
from sfumato.core.plan import StepPlan, StepResult
from sfumato.core.request import Request, Work
from sfumato.core.spec import Spec


class Inbox(Protocol):
    """Messages to the loop."""

    def fileno(self) -> int | None:
        """Return what becomes readable when a message comes; None where only this thread adds any."""
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
    """Agrees with data-parallel peers on this turn's forward."""

    def agree(self, plan: StepPlan) -> StepPlan:
        """Return the plan to run."""
        ...
