"""Joins the two sides of a hand-over to the loop; without peers, nothing ever leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sfumato.core.handover import (
    Ask,
    Blocks,
    Cancel,
    Done,
    Drained,
    Failed,
    Floor,
    Flushed,
    LinkHeard,
    LinkLost,
    LinkSilent,
    LinkUp,
    Offer,
    PeerEvent,
    Received,
    StageAsk,
    StageDone,
    Tally,
)
from sfumato.core.request import Request
from sfumato.engine.fetching import Fetching
from sfumato.engine.filling import Filling


class Endpoint(Protocol):
    """This engine's end of all its links."""

    @property
    def address(self) -> str | None:
        """Return where peers reach it, if they do."""
        ...

    def meet(self, peers: Sequence[tuple[str, str]]) -> None:
        """Connect to these and to no others."""
        ...

    def close(self) -> None:
        """End all links within a bounded time."""
        ...


class NoPeers:
    """This process runs every row of its requests."""

    address = None

    def tally(self) -> Tally:
        """Nothing is asked for."""
        return Tally()

    def takes(self, request: Request) -> bool:
        """Nothing leaves."""
        return False

    def accept(self, event: PeerEvent, floor: Floor) -> None:
        """Nobody is there who could send something."""

    def send(self, leaving: Sequence[Request], floor: Floor) -> None:
        """Nothing is sent."""

    def let_go(self, request: Request, reason: str) -> None:
        """No peer knows of it."""

    def meet(self, peers: Sequence[tuple[str, str]]) -> None:
        """This process asks nobody."""

    def close(self) -> None:
        """Nothing is open."""

    def wait_seconds(self) -> float | None:
        """Nothing is waited for."""
        return None


class PeerHandover:
    """Implements the hand-over seam: asks peers to prefill (fetching), prefills for peers (filling)."""

    def __init__(self, fetching: Fetching, filling: Filling, endpoint: Endpoint) -> None:
        self.fetching = fetching
        self.filling = filling
        self.endpoint = endpoint

    def tally(self) -> Tally:
        """Return what has been asked for so far."""
        counts = self.fetching.counts
        return Tally(counts.arrived, counts.failed, self.fetching.num_draining_pages)

    @property
    def address(self) -> str | None:
        """Return where peers reach this process, if they do."""
        return self.endpoint.address

    def meet(self, peers: Sequence[tuple[str, str]]) -> None:
        """Be helped by these from now on; what others were asked for is done elsewhere."""
        self.endpoint.meet(peers)

    def close(self) -> None:
        """End all links."""
        self.endpoint.close()

    def takes(self, request: Request) -> bool:
        """Whether a running request is on its way to a peer, or has what its peer asked for."""
        return self.filling.takes(request) or self.fetching.takes(request)

    def accept(self, event: PeerEvent, floor: Floor) -> None:
        """Give an event to the side that it concerns; what happens to a link concerns both."""
        match event.news:
            case Ask() | Cancel() | Received() | Flushed():
                self.filling.accept(event, floor)
            case Blocks() | Done() | Failed() | Drained():
                self.fetching.accept(event, floor)
            case Offer() | StageAsk() | StageDone():
                # Layouts of images and of text never fit, so that nobody on this link says so.
                pass
            case LinkUp() | LinkLost() | LinkSilent() | LinkHeard():
                self.fetching.accept(event, floor)
                self.filling.accept(event, floor)

    def send(self, leaving: Sequence[Request], floor: Floor) -> None:
        """Ask peers for what leaves, and send them what they asked for."""
        for request in leaving:
            if self.filling.takes(request):
                continue
            self.fetching.ask(request)
        self.fetching.expire(floor)
        self.filling.send(floor)

    def let_go(self, request: Request, reason: str) -> None:
        """Tell whichever peer has to do with a request that ends."""
        self.fetching.let_go(request)
        self.filling.let_go(request, reason)

    def wait_seconds(self) -> float | None:
        """Return the time until an unanswered hand-over is given up."""
        return self.fetching.wait_seconds()
