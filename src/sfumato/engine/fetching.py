"""The denoise side of hand-overs: pages are reserved here, a peer fills them, and the request goes on here.

The request never leaves this process: a peer that fails, dies or is late costs only the time until its
prompt is prefilled by another one, or here.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sfumato.cache.pages import PageCache
from sfumato.cache.pool import LeaseState, PageLease
from sfumato.core.handover import (
    Ask,
    Blocks,
    Cancel,
    Done,
    Drained,
    Failed,
    Floor,
    Link,
    LinkHeard,
    LinkLost,
    LinkSilent,
    LinkUp,
    PeerEvent,
    Received,
    RequestState,
)
from sfumato.core.plan import RowKind
from sfumato.core.request import Request, Status
from sfumato.engine.roster import Roster
from sfumato.engine.scheduler import Scheduler
from sfumato.errors import EngineError

# A cancel that nobody has answered is said again after so many seconds: a transport may lose it.
_REPEAT_SECONDS = 1.0
# A peer whose connection broke notices it within its silence and ends what it writes within seconds more.
_LOST_SECONDS = 60.0


class PageCopy(Protocol):
    """Keys and values of pages as bytes; pages in token order."""

    def pack(self, pages: Sequence[int]) -> bytes | bytearray:
        """Return the keys and values of pages."""
        ...

    def unpack(self, pages: Sequence[int], payload: bytes | bytearray | memoryview) -> None:
        """Write keys and values to pages. Raises EngineError if the payload has another size."""
        ...


@dataclass(slots=True)
class _Fetch:
    """A request whose known tokens [received, end) a peer computes."""

    handover_id: str
    request: Request
    lease: PageLease
    link: Link
    received: int
    end: int
    heard_at: float


@dataclass(slots=True)
class _Drain:
    """Pages that nobody here wants, until their peer has said that it writes no more."""

    lease: PageLease
    link: Link
    asked_at: float
    release_at: float = math.inf


@dataclass(slots=True)
class FetchCounts:
    """What came of hand-overs so far; refused: messages with an unknown id, or out of their order."""

    asked: int = 0
    arrived: int = 0
    failed: int = 0
    refused: int = 0
    tokens: int = 0


@dataclass
class Fetching:
    """Asks peers for the keys of known tokens.

    copy: writes what comes in messages to pages. timeout: seconds without progress after which a hand-over
    is given up.
    """

    scheduler: Scheduler
    pages: PageCache
    copy: PageCopy
    clock: Callable[[], float]
    timeout: float
    counts: FetchCounts = field(default_factory=FetchCounts)

    def __post_init__(self) -> None:
        self._name = secrets.token_hex(8)
        self._serial = itertools.count()
        self.roster = Roster()
        self._fetches: dict[str, _Fetch] = {}
        self._drains: dict[str, _Drain] = {}

    @property
    def num_draining_pages(self) -> int:
        """Return how many pages wait for a peer to say that it has stopped."""
        return sum(len(drain.lease.pages) for drain in self._drains.values())

    def leases(self) -> list[PageLease]:
        """Return the leases that no request holds any more."""
        return [drain.lease for drain in self._drains.values()]

    def takes(self, request: Request) -> bool:
        """Whether whole known blocks of a running request lack keys and a peer may be asked for them."""
        if request.status is not Status.RUNNING:
            return False
        standing = request.standing
        if standing.missing is None or standing.missing.feeds or request.in_flight or request.is_leaving:
            return False
        if self._end(request) <= standing.cached_len:
            return False
        return self.roster.choose(request.id, RowKind.PREFILL) is not None

    def _end(self, request: Request) -> int:
        """Return the end of the whole blocks that are known; the ragged rest is fed here."""
        size = request.standing.block_length
        return len(request.standing.known_tokens) // size * size

    def ask(self, request: Request) -> None:
        """Reserve pages for everything that is known, then ask; without room the request is fed here."""
        link, lease = self.roster.choose(request.id, RowKind.PREFILL), request.lease
        assert link is not None
        assert isinstance(lease, PageLease)
        start, end = request.standing.cached_len, self._end(request)
        page_size = self.pages.pool.page_size
        if not self.pages.extend(lease, end // page_size):
            self.roster.fail_all(request.id)
            return
        handover_id = f"{self._name}-{next(self._serial)}"
        lease.become(LeaseState.PENDING)
        request.status = Status.AWAY
        self._fetches[handover_id] = _Fetch(
            handover_id, request, lease, link, start, end, heard_at=self.clock()
        )
        self.roster.owe(link, end - start)
        self.counts.asked += 1
        known = request.standing.known_tokens[:end]
        link.send(
            Ask(
                handover_id=handover_id,
                state=RequestState(known_ids=known, block_length=request.standing.block_length),
                start=start,
                pages=tuple(lease.pages[start // page_size : end // page_size]),
                priority=request.priority,
            )
        )

    def accept(self, event: PeerEvent, floor: Floor) -> None:
        """Act on what a peer sent, or on what happened to it."""
        match event.news:
            case Blocks():
                self._take_blocks(event, event.news)
            case Done():
                self._take_done(event, event.news)
            case Failed():
                self._take_failed(event, event.news)
            case Drained():
                self._take_drained(event, event.news)
            case LinkUp(prefills=True):
                self.roster.add(event.link, (RowKind.PREFILL,))
            case LinkHeard():
                self.roster.set_silent(event.link, False)
            case LinkSilent():
                self._note_silence(event.link)
            case LinkLost(is_over=is_over):
                self._forget(event.link, is_over=is_over)

    def _take_blocks(self, event: PeerEvent, blocks: Blocks) -> None:
        fetch = self._known(event, blocks.handover_id)
        if fetch is None:
            return
        if blocks.end <= fetch.received:
            # A transport has brought them twice.
            self.counts.refused += 1
            return
        request, page_size = fetch.request, self.pages.pool.page_size
        size = request.standing.block_length
        is_whole = blocks.start % size == 0 and blocks.end % size == 0
        is_empty = event.payload is None and event.link.is_fenced
        if blocks.start != fetch.received or blocks.end > fetch.end or not is_whole or is_empty:
            self._refuse(fetch)
            return
        if event.payload is not None:
            span = fetch.lease.pages[blocks.start // page_size : blocks.end // page_size]
            try:
                self.copy.unpack(span, event.payload)
            except EngineError:
                self._refuse(fetch)
                return
        fetch.heard_at = self.clock()
        self.roster.owe(fetch.link, fetch.received - blocks.end)
        self.counts.tokens += blocks.end - fetch.received
        fetch.received = blocks.end
        _arrive(request, blocks.end, 0)
        self.scheduler.share(request)

    def _take_done(self, event: PeerEvent, done: Done) -> None:
        """The arrival: it is acknowledged here and nowhere else, whether a forward runs or not."""
        fetch = self._known(event, done.handover_id)
        if fetch is None:
            return
        if fetch.received < fetch.end:
            self._refuse(fetch)
            return
        self._close(fetch)
        fetch.lease.become(LeaseState.READY)
        fetch.request.status = Status.RUNNING
        _arrive(fetch.request, fetch.end, done.nfe)
        self.counts.arrived += 1
        self.roster.forgive(fetch.request.id)
        fetch.link.send(Received(handover_id=fetch.handover_id))

    def _take_failed(self, event: PeerEvent, failed: Failed) -> None:
        """The peer has stopped: what has come is kept, and the rest is asked of another, or fed here."""
        drain = self._drains.get(failed.handover_id)
        if drain is not None and drain.link is event.link:
            self._release(failed.handover_id)
            return
        fetch = self._known(event, failed.handover_id)
        if fetch is not None:
            self._resume(fetch)

    def _take_drained(self, event: PeerEvent, drained: Drained) -> None:
        drain = self._drains.get(drained.handover_id)
        if drain is None or drain.link is not event.link:
            self.counts.refused += 1
            return
        self._release(drained.handover_id)

    def _known(self, event: PeerEvent, handover_id: str) -> _Fetch | None:
        """Return an open hand-over of this link; any other message is refused and changes nothing."""
        fetch = self._fetches.get(handover_id)
        if fetch is None or fetch.link is not event.link:
            self.counts.refused += 1
            return None
        return fetch

    def _refuse(self, fetch: _Fetch) -> None:
        """Something was lost or is not what was asked for: nothing more of it is taken."""
        self.counts.refused += 1
        self._give_up(fetch)

    def _give_up(self, fetch: _Fetch) -> None:
        """Leave the pages to the peer until it has stopped; the request waits for others."""
        self.roster.fail(fetch.request.id, fetch.link)
        self._drain(fetch)
        self.scheduler.detach(fetch.request)

    def _resume(self, fetch: _Fetch) -> None:
        """The peer writes no more: the request keeps its pages and goes on from what has come."""
        self.roster.fail(fetch.request.id, fetch.link)
        self._close(fetch)
        self.counts.failed += 1
        fetch.lease.become(LeaseState.FAILED)
        fetch.lease.become(LeaseState.READY)
        fetch.request.status = Status.RUNNING

    def _drain(self, fetch: _Fetch) -> None:
        self._close(fetch)
        self.counts.failed += 1
        fetch.lease.become(LeaseState.DRAINING)
        self._drains[fetch.handover_id] = _Drain(fetch.lease, fetch.link, self.clock())
        fetch.link.send(Cancel(handover_id=fetch.handover_id))

    def _close(self, fetch: _Fetch) -> None:
        del self._fetches[fetch.handover_id]
        self.roster.owe(fetch.link, fetch.received - fetch.end)

    def _release(self, handover_id: str) -> None:
        lease = self._drains.pop(handover_id).lease
        lease.become(LeaseState.FAILED)
        self.pages.pool.release(lease)

    def _note_silence(self, link: Link) -> None:
        """Ask it for nothing more, and wait for nothing that it owes."""
        self.roster.set_silent(link, True)
        for fetch in [each for each in self._fetches.values() if each.link is link]:
            if link.is_fenced:
                # Nothing of it is written that is not taken here, and from now on nothing is.
                self._resume(fetch)
                link.send(Cancel(handover_id=fetch.handover_id))
            else:
                self._give_up(fetch)
        if link.is_fenced:
            for handover_id in [key for key, drain in self._drains.items() if drain.link is link]:
                self._release(handover_id)

    def _forget(self, link: Link, *, is_over: bool) -> None:
        """A peer that has gone writes no more; one that was only lost stops when it notices, too."""
        is_stopped = is_over or link.is_fenced
        for fetch in [each for each in self._fetches.values() if each.link is link]:
            self._resume(fetch) if is_stopped else self._give_up(fetch)
        for handover_id, drain in [each for each in self._drains.items() if each[1].link is link]:
            if is_stopped:
                self._release(handover_id)
            else:
                drain.release_at = self.clock() + _LOST_SECONDS
        self.roster.remove(link)

    def expire(self, floor: Floor) -> None:
        """Give up hand-overs without progress, and repeat cancels that nobody has answered."""
        now = self.clock()
        for fetch in [each for each in self._fetches.values() if now - each.heard_at >= self.timeout]:
            self._give_up(fetch)
        for handover_id, drain in list(self._drains.items()):
            if now >= drain.release_at:
                self._release(handover_id)
            elif now - drain.asked_at >= _REPEAT_SECONDS:
                drain.asked_at = now
                drain.link.send(Cancel(handover_id=handover_id))

    def let_go(self, request: Request) -> None:
        """Take over the pages of a request that ends while a peer fills them."""
        self.roster.forgive(request.id)
        for fetch in [each for each in self._fetches.values() if each.request is request]:
            request.lease = None
            self._drain(fetch)

    def wait_seconds(self) -> float | None:
        """Return the time until something must be given up or said again."""
        now = self.clock()
        waits = [fetch.heard_at + self.timeout - now for fetch in self._fetches.values()]
        waits += [drain.asked_at + _REPEAT_SECONDS - now for drain in self._drains.values()]
        return max(0.0, min(waits)) if waits else None


def _arrive(request: Request, cached_len: int, nfe: int) -> None:
    request.work.arrive(cached_len, nfe)
    request.standing = request.work.standing(request.id)
    request.usage = request.work.usage()
