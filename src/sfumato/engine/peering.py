"""Where an engine's links to its peers are opened and joined with its loop."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfumato.cache.pages import PageCache
from sfumato.core.handover import Layout, PeerEvent, RequestState
from sfumato.core.messages import Message
from sfumato.core.protocols import Inbox, WorkFactory
from sfumato.core.request import Request, Work
from sfumato.core.spec import Spec
from sfumato.core.traits import ModelTraits
from sfumato.engine.fetching import Fetching
from sfumato.engine.filling import Filling
from sfumato.engine.peer_config import HELPING, PeerConfig, parse_address
from sfumato.engine.peers import PeerHandover
from sfumato.engine.scheduler import Scheduler
from sfumato.errors import ConfigError, NotSupported
from sfumato.models.batch import KVStore
from sfumato.parallel.handover import Carrier, CopyCarrier, Endpoint, KVPages, Mailbox, make_layout
from sfumato.parallel.sockets import SocketEndpoint
from sfumato.text.prefill import bidirectional_reason, make_prefill

if TYPE_CHECKING:
    from sfumato.engine.build import Loaded

# Joins an engine's layout and pages with links to engines of the same process.
MakeEndpoint = Callable[[Layout, KVPages], Endpoint]


class PeeredInbox:
    """Messages of clients and events of peers; sleeps until either comes."""

    def __init__(self, inbox: Inbox, mailbox: Mailbox) -> None:
        self._inbox = inbox
        self._mailbox = mailbox
        self._poll = select.poll()
        self._poll.register(mailbox.fileno(), select.POLLIN)
        for number in inbox.filenos():
            self._poll.register(number, select.POLLIN)

    def filenos(self) -> list[int]:
        """Return those of both."""
        return [self._mailbox.fileno(), *self._inbox.filenos()]

    @property
    def is_called(self) -> bool:
        """Whether another rank waits for this one's next turn."""
        return self._inbox.is_called

    def drain(self, *, wait_seconds: float | None) -> list[Message | PeerEvent]:
        """Return all that is there; where it may wait, for the first that comes."""
        found = self._take()
        # A ring that has been read already makes nothing readable any more.
        if not found and wait_seconds != 0 and not self.is_called:
            self._poll.poll(None if wait_seconds is None else max(1, int(wait_seconds * 1000)))
            found = self._take()
        return found

    def _take(self) -> list[Message | PeerEvent]:
        messages: Iterable[Message | PeerEvent] = self._inbox.drain(wait_seconds=0)
        return [*messages, *self._mailbox.take()]


@dataclass(frozen=True, slots=True)
class Peering:
    """One engine's part in a hand-over: its role, its links and its pages as bytes."""

    role: str
    endpoint: Endpoint
    copy: KVPages
    page_size: int
    num_pages: int
    prefill_seconds: float

    def inbox(self, inbox: Inbox) -> PeeredInbox:
        """Return an inbox that hears peers too."""
        return PeeredInbox(inbox, self.endpoint.mailbox)

    def door(self, door: WorkFactory) -> WorkFactory:
        """Return the door for clients: an engine that prefills for peers has none."""
        return closed_door if self.role in HELPING else door


def closed_door(request_id: str, spec: Spec) -> Work:
    """Refuse a client of an engine that works for others. Raises NotSupported."""
    raise NotSupported(
        "this engine works for denoise engines (--role) and takes no requests of its own", field="role"
    )


def join_peers(
    peering: Peering,
    scheduler: Scheduler,
    pages: PageCache,
    traits: ModelTraits,
    clock: Callable[[], float],
) -> PeerHandover:
    """Join links, pages and scheduler; from now on the scheduler leaves alone what peers prefill."""

    def make(state: RequestState) -> Work:
        return make_prefill(
            state.known_ids,
            traits,
            block_length=state.block_length,
            page_size=peering.page_size,
            num_pages=peering.num_pages,
        )

    fetching = Fetching(scheduler, pages, peering.copy, clock, peering.prefill_seconds)
    peers = PeerHandover(fetching, Filling(make, peering.page_size), peering.endpoint)

    def takes(request: Request) -> bool:
        return peers.takes(request)

    scheduler.takes = takes
    return peers


def open_peering(
    loaded: Loaded, store: KVStore, page_size: int, num_pages: int, make_endpoint: MakeEndpoint | None
) -> Peering | None:
    """Open the links that the configuration names, or those of a caller; None for an engine that is alone.

    Raises ConfigError for a model whose prefill cannot be done elsewhere, PeerRefused for a peer that does
    not fit.
    """
    config, traits = loaded.config.peering, loaded.traits
    if config.role in ("encode", "decode"):
        raise ConfigError(f"--role {config.role} is for image models; {loaded.config.model} writes text")
    if config.role != "both" and not traits.has_exact_cache:
        raise ConfigError(f"--role {config.role} for {loaded.config.model}: {bidirectional_reason(traits)}")
    if make_endpoint is None and config.is_alone:
        return None
    copy = KVPages(store, page_size)
    layout = make_layout(
        loaded.folder.name,
        loaded.folder.path,
        traits,
        dtype=loaded.dtype,
        page_size=page_size,
        transport=config.transport,
    )
    if make_endpoint is not None:
        endpoint = make_endpoint(layout, copy)
    else:
        endpoint = open_endpoint(config, layout, _carrier(config, copy, store, layout.page_size))
    return Peering(
        role=config.role,
        endpoint=endpoint,
        copy=copy,
        page_size=page_size,
        num_pages=num_pages,
        prefill_seconds=config.prefill_seconds,
    )


def open_endpoint(config: PeerConfig, layout: Layout, carrier: Carrier) -> Endpoint:
    """Listen and connect as configured. Raises ConfigError or PeerRefused."""
    secret = (config.secret or "").encode()
    endpoint = SocketEndpoint(layout, carrier, secret=secret, silence_seconds=config.silence_seconds)
    try:
        if config.listen is not None:
            endpoint.listen(*parse_address("--listen", config.listen))
        for address in config.peers:
            endpoint.connect(*parse_address("--peers", address))
    except BaseException:
        endpoint.close()
        raise
    return endpoint


def _carrier(config: PeerConfig, copy: KVPages, store: KVStore, page_size: int) -> Carrier:
    if config.transport == "sockets":
        return CopyCarrier(copy)
    # An extra, imported where it is asked for.
    from sfumato.parallel.nixl import NixlCarrier

    return NixlCarrier(store, page_size)
