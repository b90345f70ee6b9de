"""Which peers may be asked for work: who is there, who is silent, what each owes, whom each has failed."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.core.handover import Link
from sfumato.core.plan import RowKind


@dataclass(slots=True)
class _Peer:
    """A link, the kinds of rows it runs for others, whether it has gone silent, and what it owes."""

    link: Link
    kinds: tuple[RowKind, ...]
    is_silent: bool = False
    owed: int = 0


class Roster:
    """The engines that work for this one; a request is not given again to one that has failed it."""

    def __init__(self) -> None:
        self._peers: list[_Peer] = []
        # Peers that have failed a request, by its id.
        self._failed: dict[str, list[Link]] = {}

    @property
    def num_able(self) -> int:
        """Return how many have said what they run."""
        return sum(bool(peer.kinds) for peer in self._peers)

    @property
    def num_failed(self) -> int:
        """Return how many requests some peer has failed, and that have not ended since."""
        return len(self._failed)

    def add(self, link: Link, kinds: tuple[RowKind, ...] = ()) -> None:
        """Take in a peer; kinds: what it runs, or nothing until it has said so."""
        self._peers.append(_Peer(link, kinds))

    def remove(self, link: Link) -> None:
        """Forget a peer that has gone."""
        self._peers = [peer for peer in self._peers if peer.link is not link]

    def offer(self, link: Link, kinds: tuple[RowKind, ...]) -> None:
        """Note what a peer runs."""
        for peer in self._of(link):
            peer.kinds = kinds

    def set_silent(self, link: Link, is_silent: bool) -> None:
        """Ask a silent peer for nothing until it is heard again."""
        for peer in self._of(link):
            peer.is_silent = is_silent

    def owe(self, link: Link, amount: int) -> None:
        """Note what a peer has been asked for, or (below 0) has done."""
        for peer in self._of(link):
            peer.owed += amount

    def fail(self, request_id: str, link: Link) -> None:
        """Note that a peer has failed a request."""
        self._failed.setdefault(request_id, []).append(link)

    def fail_all(self, request_id: str) -> None:
        """Ask none of those that are there for this request."""
        self._failed[request_id] = [peer.link for peer in self._peers]

    def forgive(self, request_id: str) -> None:
        """Forget who has failed a request that has got what it wanted, or has ended."""
        self._failed.pop(request_id, None)

    def choose(self, request_id: str, kind: RowKind) -> Link | None:
        """Return the one that owes least of those that run a kind, are heard, and have not failed this."""
        failed = self._failed.get(request_id, ())
        able = [
            peer
            for peer in self._peers
            if kind in peer.kinds and not peer.is_silent and peer.link not in failed
        ]
        chosen = min(able, key=lambda peer: peer.owed, default=None)
        return None if chosen is None else chosen.link

    def _of(self, link: Link) -> list[_Peer]:
        return [peer for peer in self._peers if peer.link is link]
