"""What two engines say to each other when one works for the other: plain data, and the link as a seam.

The denoise side owns a request from its arrival to its end. It reserves pages, asks a peer to fill them
(`Ask`), takes keys and values of whole blocks as they come (`Blocks`, then `Done`) and acknowledges them once
(`Received`). Whoever wants out says `Cancel`; pages are used again after `Drained`. Stages of images hold no
pages: one is asked for (`StageAsk`), its outcome comes back (`StageDone`) and is acknowledged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from sfumato.core.messages import TokenLogprob
from sfumato.core.plan import RowKind, RowResult
from sfumato.core.request import Request, Work
from sfumato.core.spec import ImageSpec, Spec


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What must be equal on both sides so that keys and values mean the same.

    fingerprint: of the weights. kv_shapes: (key-value heads, head width) of each layer.
    """

    model: str
    fingerprint: str
    dtype: str
    page_size: int
    block_length: int
    kv_shapes: tuple[tuple[int, int], ...]
    transport: str = "sockets"

    def difference(self, denoise: Layout) -> str | None:
        """Name the first field of a prefill engine's layout that a denoise engine's differs in, or None."""
        theirs = msgspec.structs.asdict(denoise)
        for name, own in msgspec.structs.asdict(self).items():
            if own != theirs[name]:
                return (
                    f"the engines do not fit: {name} is {_short(own)} on the prefill side "
                    f"and {_short(theirs[name])} on the denoise side"
                )
        return None


class CanvasState(msgspec.Struct, frozen=True, kw_only=True):
    """The denoise state of a text request: arrays as bytes, i64 tokens and bool flags of all positions.

    output_end: position up to which tokens have been output. logprobs: of decided positions behind it.
    algorithm_state: what the algorithm keeps within the open block, as `text.plain_state` encodes it.
    """

    token_ids: bytes
    pinned: bytes
    undecided: bytes
    block_start: int
    step: int
    masks_at_start: int
    output_end: int
    denoise_steps: int
    nfe: int
    hit_len: int
    algorithm_state: bytes
    logprobs: dict[int, TokenLogprob] = {}


class RequestState(msgspec.Struct, frozen=True, kw_only=True):
    """A request as one process gives it to another.

    known_ids: tokens from position 0 whose keys are to be computed. Keys alone need no more; a request that
    moves brings its spec, whose seed is its random source, and its canvas.
    """

    known_ids: tuple[int, ...]
    block_length: int
    spec: Spec | None = None
    canvas: CanvasState | None = None


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag="ask"):
    """Pages are reserved: compute keys and values of positions [start, end), the end of `state.known_ids`.

    pages: the receiver's pages from position `start` on. priority: the request's.
    """

    handover_id: str
    state: RequestState
    start: int
    pages: tuple[int, ...]
    priority: int = 0


class Blocks(msgspec.Struct, frozen=True, kw_only=True, tag="blocks"):
    """Keys and values of positions [start, end), whole blocks: they come along, or lie in the pages."""

    handover_id: str
    start: int
    end: int


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """Everything that was asked for has been sent; it took nfe forwards."""

    handover_id: str
    nfe: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """Nothing more will be sent or written, and why."""

    handover_id: str
    reason: str


class Received(msgspec.Struct, frozen=True, kw_only=True, tag="received"):
    """The arrival is acknowledged, once."""

    handover_id: str


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Stop sending and writing."""

    handover_id: str


class Drained(msgspec.Struct, frozen=True, kw_only=True, tag="drained"):
    """Answers a cancel: nothing is written to these pages any more."""

    handover_id: str


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """Sent once by an engine that runs stages of images for others: which kinds of rows."""

    kinds: tuple[RowKind, ...]


class StageAsk(msgspec.Struct, frozen=True, kw_only=True, tag="stage"):
    """Run one row of an image request: kind and branch as in `Row`; what its stage reads comes along."""

    handover_id: str
    kind: RowKind
    branch: str
    spec: ImageSpec
    priority: int = 0


class StageDone(msgspec.Struct, frozen=True, kw_only=True, tag="staged"):
    """What the stage has made comes along."""

    handover_id: str


PeerMessage = Ask | Blocks | Done | Failed | Received | Cancel | Drained | Offer | StageAsk | StageDone


class LinkUp(msgspec.Struct, frozen=True, kw_only=True, tag="up"):
    """A peer is connected; prefills: it can be asked, else it is the one that asks."""

    prefills: bool


class LinkLost(msgspec.Struct, frozen=True, kw_only=True, tag="lost"):
    """A peer's connection has ended; a new one is a new link.

    is_over: the peer has closed it, so that it has gone or writes no more; else it may still be there.
    """

    reason: str
    is_over: bool


class LinkSilent(msgspec.Struct, frozen=True, kw_only=True, tag="silent"):
    """A peer has not been heard of for so many seconds; it may still be there."""

    seconds: float


class LinkHeard(msgspec.Struct, frozen=True, tag="heard"):
    """A silent peer is back."""


class Flushed(msgspec.Struct, frozen=True, kw_only=True, tag="flushed"):
    """Everything of a hand-over up to its `Done` has left this process."""

    handover_id: str


LinkNews = LinkUp | LinkLost | LinkSilent | LinkHeard | Flushed


class Link(Protocol):
    """One peer. Calls never wait for it; what it says comes as events."""

    @property
    def peer(self) -> str:
        """Return what to call it in messages."""
        ...

    @property
    def is_fenced(self) -> bool:
        """Whether keys and values come in messages alone, so that a refused message writes nothing."""
        ...

    def send(self, message: PeerMessage, payload: bytes | bytearray | None = None) -> None:
        """Queue a message and what comes along; messages arrive in order."""
        ...

    def push(self, blocks: Blocks, pages: Sequence[int], peer_pages: Sequence[int]) -> None:
        """Queue blocks with the keys and values of own pages, which may be used again on return."""
        ...


@dataclass(frozen=True, slots=True)
class PeerEvent:
    """Something that a link brought; payload: what came along, None where it lies in the pages."""

    link: Link
    news: PeerMessage | LinkNews
    payload: bytes | bytearray | memoryview | None = None


class Floor(Protocol):
    """What a hand-over may do to the loop's requests."""

    @property
    def live(self) -> Mapping[str, Request]:
        """Return the live requests."""
        ...

    @property
    def is_closing(self) -> bool:
        """Whether nothing new is taken in."""
        ...

    def enter(self, request_id: str, work: Work) -> Request:
        """Take in a request that a peer sent."""
        ...

    def leave(self, request_id: str) -> None:
        """End a peer's request without an output: it ends elsewhere."""
        ...

    def advance(self, request: Request, results: list[RowResult]) -> None:
        """Let a request that was away take the results of rows that a peer ran."""
        ...


@dataclass(frozen=True, slots=True)
class Tally:
    """What a denoise engine's hand-overs have come to, and the pages that still wait for a peer's word."""

    arrived: int = 0
    failed: int = 0
    draining_pages: int = 0


class Handover(Protocol):
    """State and keys to and from peers, as the loop sees it."""

    def tally(self) -> Tally:
        """Return what has been asked for so far."""
        ...

    def takes(self, request: Request) -> bool:
        """Whether a running request's next rows are not this process's to run."""
        ...

    def accept(self, event: PeerEvent, floor: Floor) -> None:
        """Act on what a peer sent."""
        ...

    def send(self, leaving: Sequence[Request], floor: Floor) -> None:
        """Hand over what leaves, send what has been computed for peers, and look at the clock."""
        ...

    def let_go(self, request: Request, reason: str) -> None:
        """A request ends: take over the pages that a peer may still write to, and tell it."""
        ...

    @property
    def address(self) -> str | None:
        """Return where peers reach this process, if they do."""
        ...

    def meet(self, peers: Sequence[tuple[str, str]]) -> None:
        """Be helped by these from now on, and by no others: (address, shared secret) each."""
        ...

    def close(self) -> None:
        """End all links."""
        ...

    def wait_seconds(self) -> float | None:
        """Return how long the loop may sleep before `send` must look at the clock; None: for ever."""
        ...


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:80]}..."
