"""Links between engines of one process: messages through queues, keys and values copied."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.core.handover import (
    Blocks,
    Done,
    Flushed,
    Layout,
    LinkLost,
    LinkNews,
    LinkUp,
    PeerEvent,
    PeerMessage,
)
from sfumato.errors import PeerRefused
from sfumato.parallel.handover import Carrier, Mailbox


class InProcessLink:
    """One direction: what is sent here arrives in the other engine's mailbox."""

    is_fenced = True

    def __init__(self, peer: str, carrier: Carrier) -> None:
        self.peer = peer
        self._carrier = carrier
        self._other: InProcessLink | None = None
        self._inbox: Mailbox | None = None

    def join(self, other: InProcessLink, inbox: Mailbox) -> None:
        """Set the other direction, and where this side's events come in."""
        self._other, self._inbox = other, inbox

    def send(self, message: PeerMessage, payload: bytes | bytearray | None = None) -> None:
        """Put a message into the other's mailbox."""
        self.deliver(message, payload)
        if isinstance(message, Done):
            self.notify(Flushed(handover_id=message.handover_id))

    def push(self, blocks: Blocks, pages: Sequence[int], peer_pages: Sequence[int]) -> None:
        """Copy keys and values and put them into the other's mailbox."""
        self.deliver(blocks, self._carrier.push("", pages, peer_pages))

    def deliver(self, message: PeerMessage, payload: bytes | bytearray | None) -> None:
        """Hand something over at once; a test's transport does otherwise."""
        if self._other is not None and self._other._inbox is not None:
            self._other._inbox.put(PeerEvent(self._other, message, payload))

    def notify(self, news: LinkNews) -> None:
        """Tell this side's engine something about the link."""
        if self._inbox is not None:
            self._inbox.put(PeerEvent(self, news))

    def cut(self, reason: str, *, is_over: bool = True) -> None:
        """End the link on both sides, as if a process had gone, or the network."""
        other, self._other = self._other, None
        for end in (self, other):
            if end is not None:
                end._other = None
                end.notify(LinkLost(reason=reason, is_over=is_over))


class InProcessEndpoint:
    """One engine's end of its links to others in the same process."""

    address = None

    def __init__(self, layout: Layout, carrier: Carrier) -> None:
        self.layout = layout
        self.carrier = carrier
        self.mailbox = Mailbox()
        self.links: list[InProcessLink] = []

    def meet(self, peers: Sequence[tuple[str, str]]) -> None:
        """Its links are joined by whoever made it."""

    def close(self) -> None:
        """End all links."""
        for link in self.links:
            link.cut("the engine was closed")
        self.mailbox.close()


def connect(
    denoise: InProcessEndpoint,
    prefill: InProcessEndpoint,
    make_link: type[InProcessLink] = InProcessLink,
) -> tuple[InProcessLink, InProcessLink]:
    """Let one engine ask the other; return each one's link. Raises PeerRefused naming the difference."""
    difference = prefill.layout.difference(denoise.layout)
    if difference is not None:
        raise PeerRefused(difference)
    asking = make_link("prefill", denoise.carrier)
    asked = make_link("denoise", prefill.carrier)
    asking.join(asked, denoise.mailbox)
    asked.join(asking, prefill.mailbox)
    denoise.links.append(asking)
    prefill.links.append(asked)
    asking.notify(LinkUp(prefills=True))
    asked.notify(LinkUp(prefills=False))
    return asking, asked
