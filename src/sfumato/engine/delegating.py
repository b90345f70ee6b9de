"""The denoise side of images whose encodings or decodings are a peer's.

A request never leaves this process: while a peer runs one of its stages it waits here, and a peer that fails,
dies or is late costs only the time until another one, or this process, runs the stage.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from sfumato.core.handover import (
    Cancel,
    Failed,
    Floor,
    Link,
    LinkHeard,
    LinkLost,
    LinkSilent,
    LinkUp,
    Offer,
    PeerEvent,
    Received,
    StageAsk,
    StageDone,
)
from sfumato.core.plan import Row, RowResult
from sfumato.core.request import Request, Status
from sfumato.core.spec import ImageSpec
from sfumato.engine.roster import Roster
from sfumato.errors import RequestError

# What a stage reads, as bytes; and its outcome from bytes (RequestError where they are none).
Pack = Callable[[Request, Row], bytes]
Unpack = Callable[[Request, Row, bytes], object]
SpecOf = Callable[[Request], ImageSpec]


@dataclass(slots=True)
class _Asked:
    """One stage that a peer runs."""

    handover_id: str
    request: Request
    row: Row
    link: Link
    asked_at: float


@dataclass(slots=True)
class StageCounts:
    """What came of stages so far; refused: messages with an unknown id."""

    asked: int = 0
    arrived: int = 0
    failed: int = 0
    refused: int = 0


@dataclass
class Delegating:
    """Asks peers for stages. timeout: seconds after which an answer is no longer waited for."""

    pack: Pack
    unpack: Unpack
    spec_of: SpecOf
    clock: Callable[[], float]
    timeout: float
    counts: StageCounts = field(default_factory=StageCounts)

    def __post_init__(self) -> None:
        self._name = secrets.token_hex(8)
        self._serial = itertools.count()
        self.roster = Roster()
        self._asked: dict[str, _Asked] = {}

    def takes(self, request: Request) -> bool:
        """Whether a running request's next stage can be asked of a peer."""
        if request.status is not Status.RUNNING or request.in_flight or request.is_leaving:
            return False
        rows = request.standing.denoise
        return bool(rows) and self.roster.choose(request.id, rows[0].kind) is not None

    def ask(self, request: Request) -> None:
        """Give a request's next stage to a peer."""
        row = request.standing.denoise[0]
        link = self.roster.choose(request.id, row.kind)
        assert link is not None
        handover_id = f"{self._name}-{next(self._serial)}"
        request.status = Status.AWAY
        if request.started_at is None:
            request.started_at = self.clock()
        self._asked[handover_id] = _Asked(handover_id, request, row, link, self.clock())
        self.roster.owe(link, 1)
        self.counts.asked += 1
        message = StageAsk(
            handover_id=handover_id,
            kind=row.kind,
            branch=row.branch,
            spec=self.spec_of(request),
            priority=request.priority,
        )
        link.send(message, self.pack(request, row))

    def accept(self, event: PeerEvent, floor: Floor) -> None:
        """Act on what a peer sent, or on what happened to it."""
        match event.news:
            case LinkUp(prefills=True):
                self.roster.add(event.link)
            case Offer(kinds=kinds):
                self.roster.offer(event.link, kinds)
            case StageDone(handover_id=handover_id):
                self._take(event, handover_id, floor)
            case Failed(handover_id=handover_id):
                asked = self._known(event, handover_id)
                if asked is not None:
                    self._give_up(asked)
            case LinkSilent():
                self.roster.set_silent(event.link, True)
                self._give_up_all(event.link)
            case LinkHeard():
                self.roster.set_silent(event.link, False)
            case LinkLost():
                self._give_up_all(event.link)
                self.roster.remove(event.link)

    def _take(self, event: PeerEvent, handover_id: str, floor: Floor) -> None:
        """The arrival: it is acknowledged here, once, whether a forward runs or not."""
        asked = self._known(event, handover_id)
        if asked is None:
            return
        try:
            outcome = self.unpack(asked.request, asked.row, bytes(event.payload or b""))
        except RequestError:
            self.counts.refused += 1
            self._give_up(asked)
            return
        self._close(asked)
        self.counts.arrived += 1
        asked.link.send(Received(handover_id=handover_id))
        self.roster.forgive(asked.request.id)
        floor.advance(asked.request, [RowResult(row=asked.row, outcome=outcome)])

    def _known(self, event: PeerEvent, handover_id: str) -> _Asked | None:
        asked = self._asked.get(handover_id)
        if asked is None or asked.link is not event.link:
            self.counts.refused += 1
            return None
        return asked

    def _give_up(self, asked: _Asked) -> None:
        """The stage is asked of another peer, or run here."""
        self._close(asked)
        self.counts.failed += 1
        self.roster.fail(asked.request.id, asked.link)
        asked.request.status = Status.RUNNING
        asked.link.send(Cancel(handover_id=asked.handover_id))

    def _give_up_all(self, link: Link) -> None:
        for asked in [each for each in self._asked.values() if each.link is link]:
            self._give_up(asked)

    def _close(self, asked: _Asked) -> None:
        del self._asked[asked.handover_id]
        self.roster.owe(asked.link, -1)

    def expire(self) -> None:
        """Give up what nobody has answered in time."""
        now = self.clock()
        for asked in [each for each in self._asked.values() if now - each.asked_at >= self.timeout]:
            self._give_up(asked)

    def let_go(self, request: Request) -> None:
        """A request ends while a peer runs a stage of it: the outcome is nobody's."""
        self.roster.forgive(request.id)
        for asked in [each for each in self._asked.values() if each.request is request]:
            self._close(asked)
            asked.link.send(Cancel(handover_id=asked.handover_id))

    def wait_seconds(self) -> float | None:
        """Return the time until something must be given up."""
        now = self.clock()
        waits = [asked.asked_at + self.timeout - now for asked in self._asked.values()]
        return max(0.0, min(waits)) if waits else None
