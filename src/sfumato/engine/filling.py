"""The prefill side of hand-overs: what peers ask for is prefilled here, and sent while more of it runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from sfumato.core.handover import (
    Ask,
    Blocks,
    Cancel,
    Done,
    Drained,
    Failed,
    Floor,
    Flushed,
    Link,
    LinkLost,
    LinkSilent,
    PeerEvent,
    Received,
    RequestState,
)
from sfumato.core.request import Request, Status, Work
from sfumato.errors import RequestError

# Hand-over ids that are remembered after their end, so that a late or doubled `Ask` starts nothing.
_NUM_REMEMBERED = 4096
# Tokens of keys and values in one message.
_CHUNK_TOKENS = 1024

MakePrefill = Callable[[RequestState], Work]


@dataclass(slots=True)
class _Fill:
    """Positions [sent, end) that a peer waits for; pages: the peer's, from position `start` on."""

    handover_id: str
    request_id: str
    link: Link
    start: int
    sent: int
    end: int
    pages: tuple[int, ...]


@dataclass(slots=True)
class FillCounts:
    """What was asked here so far; refused: asks with an id that was used before."""

    asked: int = 0
    sent: int = 0
    received: int = 0
    refused: int = 0
    ended: int = 0


@dataclass
class Filling:
    """Prefills for peers. make: builds the work of what a peer asks for, or refuses it (RequestError)."""

    make: MakePrefill
    page_size: int
    counts: FillCounts = field(default_factory=FillCounts)

    def __post_init__(self) -> None:
        self._fills: dict[str, _Fill] = {}
        # Sent, and not acknowledged yet.
        self._sent: dict[str, Link] = {}
        self._known: OrderedDict[str, None] = OrderedDict()

    @property
    def num_unacknowledged(self) -> int:
        """Return how many hand-overs have been sent and not been acknowledged."""
        return len(self._sent)

    def takes(self, request: Request) -> bool:
        """Whether a peer's request has all its keys, so that what comes next is the peer's."""
        fill = self._fill_of(request.id)
        return fill is not None and request.standing.cached_len >= fill.end

    def _fill_of(self, request_id: str) -> _Fill | None:
        return self._fills.get(request_id.removeprefix(_PREFIX)) if request_id.startswith(_PREFIX) else None

    def accept(self, event: PeerEvent, floor: Floor) -> None:
        """Act on what a peer sent, or on what happened to it."""
        match event.news:
            case Ask():
                self._take_ask(event.link, event.news, floor)
            case Cancel():
                self._take_cancel(event.link, event.news, floor)
            case Received(handover_id=handover_id):
                self._take_received(event.link, handover_id)
            case Flushed(handover_id=handover_id):
                self._end(handover_id, floor)
            case LinkSilent():
                self._drop(event.link, floor, "nothing was heard of this peer for too long")
            case LinkLost():
                self._drop(event.link, floor, None)

    def _take_ask(self, link: Link, ask: Ask, floor: Floor) -> None:
        handover_id = ask.handover_id
        if handover_id in self._known:
            # Its first one is under way, or was cancelled before it came.
            self.counts.refused += 1
            return
        self._remember(handover_id)
        if floor.is_closing:
            link.send(Failed(handover_id=handover_id, reason="the prefill engine is shutting down"))
            return
        try:
            work = self.make(ask.state)
            self._check(ask)
        except RequestError as error:
            link.send(Failed(handover_id=handover_id, reason=str(error)))
            return
        request_id = _PREFIX + handover_id
        end = len(ask.state.known_ids)
        self._fills[handover_id] = _Fill(
            handover_id, request_id, link, start=ask.start, sent=ask.start, end=end, pages=ask.pages
        )
        self.counts.asked += 1
        floor.enter(request_id, work).priority = ask.priority

    def _check(self, ask: Ask) -> None:
        """Raise RequestError for a span that does not fit the pages."""
        num_tokens = len(ask.state.known_ids) - ask.start
        is_whole = ask.start % self.page_size == 0 and num_tokens == len(ask.pages) * self.page_size
        if ask.start < 0 or num_tokens <= 0 or not is_whole:
            raise RequestError(
                f"{num_tokens} tokens from {ask.start} are not {len(ask.pages)} pages of {self.page_size}",
                field="pages",
                value=len(ask.pages),
                limit=num_tokens // self.page_size,
            )

    def _take_cancel(self, link: Link, cancel: Cancel, floor: Floor) -> None:
        """Stop, and say so behind everything that is on its way."""
        fill = self._fills.get(cancel.handover_id)
        if fill is not None and fill.link is not link:
            self.counts.refused += 1
            return
        self._remember(cancel.handover_id)
        self._end(cancel.handover_id, floor)
        self._sent.pop(cancel.handover_id, None)
        link.send(Drained(handover_id=cancel.handover_id))

    def _take_received(self, link: Link, handover_id: str) -> None:
        if self._sent.get(handover_id) is link:
            del self._sent[handover_id]
            self.counts.received += 1
        else:
            self.counts.refused += 1

    def _end(self, handover_id: str, floor: Floor) -> None:
        fill = self._fills.pop(handover_id, None)
        if fill is not None:
            floor.leave(fill.request_id)

    def _drop(self, link: Link, floor: Floor, reason: str | None) -> None:
        """End what a peer asked for that has gone, or does not answer."""
        for fill in [each for each in self._fills.values() if each.link is link]:
            if reason is not None:
                link.send(Failed(handover_id=fill.handover_id, reason=reason))
            self.counts.ended += 1
            self._end(fill.handover_id, floor)
        for handover_id in [key for key, other in self._sent.items() if other is link]:
            del self._sent[handover_id]

    def send(self, floor: Floor) -> None:
        """Send the keys and values of whole blocks that have been computed since the last turn."""
        for fill in list(self._fills.values()):
            request = floor.live[fill.request_id]
            if request.status is Status.RUNNING:
                self._push(fill, request)

    def _push(self, fill: _Fill, request: Request) -> None:
        assert request.lease is not None
        ready, size = min(request.standing.cached_len, fill.end), self.page_size
        chunk = max(
            request.standing.block_length,
            _CHUNK_TOKENS // request.standing.block_length * request.standing.block_length,
        )
        for start in range(fill.sent, ready, chunk):
            end = min(start + chunk, ready)
            fill.link.push(
                Blocks(handover_id=fill.handover_id, start=start, end=end),
                request.lease.pages[start // size : end // size],
                fill.pages[(start - fill.start) // size : (end - fill.start) // size],
            )
        fill.sent = max(fill.sent, ready)
        if fill.sent == fill.end:
            # Its pages are let go when everything has left this process: what waits to be sent stays bounded.
            request.status = Status.AWAY
            self._sent[fill.handover_id] = fill.link
            self.counts.sent += 1
            fill.link.send(Done(handover_id=fill.handover_id, nfe=request.usage.nfe))

    def let_go(self, request: Request, reason: str) -> None:
        """A peer's request has failed here: the peer goes on without."""
        fill = self._fill_of(request.id)
        if fill is None:
            return
        del self._fills[fill.handover_id]
        self.counts.ended += 1
        if fill.sent < fill.end:
            fill.link.send(Failed(handover_id=fill.handover_id, reason=reason))

    def _remember(self, handover_id: str) -> None:
        self._known[handover_id] = None
        while len(self._known) > _NUM_REMEMBERED:
            forgotten, _ = self._known.popitem(last=False)
            self._sent.pop(forgotten, None)


_PREFIX = "handover/"
