"""Joins an image engine with peers that run its encodings and decodings, or that ask it for theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sfumato.core.handover import Floor, Layout, PeerEvent, StageAsk, Tally
from sfumato.core.plan import Row, RowKind
from sfumato.core.request import Request
from sfumato.core.spec import ImageSpec
from sfumato.engine.delegating import Delegating
from sfumato.engine.lending import Lending, Stage
from sfumato.engine.peer_config import PeerConfig
from sfumato.engine.peering import open_endpoint
from sfumato.engine.peers import Endpoint
from sfumato.errors import ConfigError
from sfumato.image.door import ImageDoor
from sfumato.image.staging import StageWork
from sfumato.image.transfer import pack_asked, unpack_outcome
from sfumato.image.work import ImageWork
from sfumato.parallel.handover import CopyCarrier, KVPages, fingerprint
from sfumato.parallel.handover import Endpoint as OpenEndpoint

# Joins an engine's layout with links to engines of the same process.
MakeImageEndpoint = Callable[[Layout], OpenEndpoint]

_KINDS = {"encode": (RowKind.ENCODE,), "decode": (RowKind.DECODE,)}


class ImageHandover:
    """Implements the hand-over seam for stages of images."""

    def __init__(self, delegating: Delegating, lending: Lending, endpoint: Endpoint) -> None:
        self.delegating = delegating
        self.lending = lending
        self.endpoint = endpoint

    def tally(self) -> Tally:
        """Return what has been asked for so far."""
        counts = self.delegating.counts
        return Tally(counts.arrived, counts.failed)

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
        """Whether a running request's next stage is a peer's."""
        return self.delegating.takes(request)

    def accept(self, event: PeerEvent, floor: Floor) -> None:
        """Let both sides see an event; each acts on what concerns it."""
        self.delegating.accept(event, floor)
        self.lending.accept(event, floor)

    def send(self, leaving: Sequence[Request], floor: Floor) -> None:
        """Ask peers for what leaves, and send them what they asked for."""
        for request in leaving:
            self.delegating.ask(request)
        self.delegating.expire()
        self.lending.send(floor)

    def let_go(self, request: Request, reason: str) -> None:
        """Tell whichever peer has to do with a request that ends."""
        self.delegating.let_go(request)
        self.lending.let_go(request, reason)

    def wait_seconds(self) -> float | None:
        """Return the time until an unanswered stage is given up."""
        return self.delegating.wait_seconds()


def image_layout(name: str, path: Path, dtype: str, transport: str) -> Layout:
    """Return what engines that run stages for each other must have in common."""
    return Layout(
        model=name,
        fingerprint=fingerprint(path),
        dtype=dtype,
        page_size=0,
        block_length=0,
        kv_shapes=(),
        transport=transport,
    )


def open_image_endpoint(
    config: PeerConfig, layout: Layout, make_endpoint: MakeImageEndpoint | None
) -> OpenEndpoint | None:
    """Open the links that the configuration names, or those of a caller; None for an engine that is alone.

    Raises ConfigError or PeerRefused.
    """
    if config.role == "prefill":
        raise ConfigError(f"--role prefill is for language models; {layout.model} draws images")
    if config.transport != "sockets":
        raise ConfigError(
            f"--peer-transport {config.transport} is for keys and values; {layout.model} has none"
        )
    if make_endpoint is not None:
        return make_endpoint(layout)
    if config.is_alone:
        return None
    return open_endpoint(config, layout, CopyCarrier(KVPages(None, 1)))


def join_image_peers(
    config: PeerConfig, endpoint: Endpoint, door: ImageDoor, clock: Callable[[], float]
) -> ImageHandover:
    """Join links with the work of requests."""

    def work_of(request: Request) -> ImageWork:
        assert isinstance(request.work, ImageWork)
        return request.work

    def pack(request: Request, row: Row) -> bytes:
        return pack_asked(work_of(request).state, row.kind, row.branch)

    def unpack(request: Request, row: Row, payload: bytes) -> object:
        return unpack_outcome(door.family, work_of(request).state, row.kind, row.branch, payload)

    def spec_of(request: Request) -> ImageSpec:
        return work_of(request).state.spec

    def make(ask: StageAsk, payload: bytes) -> Stage:
        return StageWork(door, ask.spec, ask.kind, ask.branch, payload)

    delegating = Delegating(pack, unpack, spec_of, clock, config.prefill_seconds)
    return ImageHandover(delegating, Lending(make, _KINDS.get(config.role, ())), endpoint)
