"""The side that runs stages of images for peers: encodings, or decodings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sfumato.core.handover import (
    Cancel,
    Failed,
    Floor,
    Link,
    LinkLost,
    LinkSilent,
    LinkUp,
    Offer,
    PeerEvent,
    Received,
    StageAsk,
    StageDone,
)
from sfumato.core.plan import RowKind
from sfumato.core.request import Request, Work
from sfumato.errors import RequestError

# Ids that are remembered after their end, so that a late or doubled `StageAsk` starts nothing.
_NUM_REMEMBERED = 4096
_PREFIX = "stage/"


class Stage(Work, Protocol):
    """The work of one stage; outcome: what it has made, None before."""

    outcome: object

    def payload(self) -> bytes:
        """Return what it has made, as bytes."""
        ...


MakeStage = Callable[[StageAsk, bytes], Stage]


@dataclass(slots=True)
class _Lent:
    """One stage that a peer waits for."""

    request_id: str
    link: Link
    work: Stage


@dataclass(slots=True)
class LendCounts:
    """What was asked here so far; refused: asks with an id that was used before."""

    asked: int = 0
    sent: int = 0
    received: int = 0
    refused: int = 0


class Lending:
    """Runs stages for peers. make: builds the work of what a peer asks for, or refuses it (RequestError)."""

    def __init__(self, make: MakeStage, kinds: tuple[RowKind, ...]) -> None:
        self.kinds = kinds
        self.counts = LendCounts()
        self._make = make
        self._lent: dict[str, _Lent] = {}
        self._known: OrderedDict[str, None] = OrderedDict()

    def accept(self, event: PeerEvent, floor: Floor) -> None:
        """Act on what a peer sent, or on what happened to it."""
        match event.news:
            case LinkUp(prefills=False) if self.kinds:
                event.link.send(Offer(kinds=self.kinds))
            case StageAsk():
                self._take(event, event.news, floor)
            case Cancel(handover_id=handover_id):
                self._remember(handover_id)
                lent = self._lent.get(handover_id)
                if lent is not None and lent.link is event.link:
                    self._end(handover_id, floor)
            case Received():
                self.counts.received += 1
            case LinkSilent() | LinkLost():
                for handover_id in [key for key, lent in self._lent.items() if lent.link is event.link]:
                    self._end(handover_id, floor)

    def _take(self, event: PeerEvent, ask: StageAsk, floor: Floor) -> None:
        if ask.handover_id in self._known:
            self.counts.refused += 1
            return
        self._remember(ask.handover_id)
        if floor.is_closing:
            event.link.send(Failed(handover_id=ask.handover_id, reason="the engine is shutting down"))
            return
        if ask.kind not in self.kinds:
            event.link.send(Failed(handover_id=ask.handover_id, reason=f"{ask.kind} is not this engine's"))
            return
        try:
            work = self._make(ask, bytes(event.payload or b""))
        except RequestError as error:
            event.link.send(Failed(handover_id=ask.handover_id, reason=str(error)))
            return
        request_id = _PREFIX + ask.handover_id
        self._lent[ask.handover_id] = _Lent(request_id, event.link, work)
        self.counts.asked += 1
        floor.enter(request_id, work).priority = ask.priority

    def send(self, floor: Floor) -> None:
        """Send what has been made since the last turn."""
        for handover_id, lent in list(self._lent.items()):
            request = floor.live.get(lent.request_id)
            if request is not None and not request.in_flight and lent.work.outcome is not None:
                lent.link.send(StageDone(handover_id=handover_id), lent.work.payload())
                self.counts.sent += 1
                self._end(handover_id, floor)

    def let_go(self, request: Request, reason: str) -> None:
        """A peer's stage has failed here: the peer goes on without."""
        handover_id = request.id.removeprefix(_PREFIX)
        lent = self._lent.pop(handover_id, None) if request.id.startswith(_PREFIX) else None
        if lent is not None:
            lent.link.send(Failed(handover_id=handover_id, reason=reason))

    def _end(self, handover_id: str, floor: Floor) -> None:
        floor.leave(self._lent.pop(handover_id).request_id)

    def _remember(self, handover_id: str) -> None:
        self._known[handover_id] = None
        while len(self._known) > _NUM_REMEMBERED:
            self._known.popitem(last=False)
