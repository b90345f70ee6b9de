"""What goes over the sockets between a front and the replicas: claims of tickets, outputs, signs of life."""

from __future__ import annotations

from typing import Any

import msgspec

from sfumato.core.messages import Output, Refusal, Submit, Turn


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag="beat"):
    """A sign of life; a replica says who it is, and whether it has an engine; a front says nothing."""

    replica: str = ""
    model: str = ""
    is_able: bool = True


class Claim(msgspec.Struct, frozen=True, kw_only=True, tag="claim"):
    """A replica asks for the request of a ticket."""

    ticket: str


class Grant(msgspec.Struct, frozen=True, kw_only=True, tag="grant"):
    """The request of a ticket."""

    ticket: str
    submission: Submit


class Void(msgspec.Struct, frozen=True, kw_only=True, tag="void"):
    """Nobody waits for a ticket's request, or not any more."""

    ticket: str


class Accepted(msgspec.Struct, frozen=True, kw_only=True, tag="accepted"):
    """The engine has taken the request in."""

    ticket: str


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The engine can never serve the request."""

    ticket: str
    refusal: Refusal


class News(msgspec.Struct, frozen=True, kw_only=True, tag="news"):
    """One output; number: how many came before it, so that a gap is seen."""

    ticket: str
    number: int
    output: Output


class Lost(msgspec.Struct, frozen=True, kw_only=True, tag="lost"):
    """The request does not go on here; has_killed: the engine died while it had it."""

    ticket: str
    message: str
    has_killed: bool


class Told(msgspec.Struct, frozen=True, kw_only=True, tag="told"):
    """What an engine's turns tell of their steps; they carry no outputs."""

    turn: Turn


class Watching(msgspec.Struct, frozen=True, kw_only=True, tag="watching"):
    """Whether somebody at the front wants to know which requests each step ran."""

    is_on: bool


class Asked(msgspec.Struct, frozen=True, kw_only=True, tag="asked"):
    """A question of a front's: does the loop turn (is_on None), or record steps, or end the recording."""

    token: int
    is_on: bool | None = None
    num_steps: int | None = None


class Answered(msgspec.Struct, frozen=True, kw_only=True, tag="answered"):
    """What came of a question: the file of a recording, or why not."""

    token: int
    path: str | None = None
    problem: str | None = None


class PageAsked(msgspec.Struct, frozen=True, kw_only=True, tag="page_asked"):
    """One front asks another for its page of metrics."""

    token: int


class Page(msgspec.Struct, frozen=True, kw_only=True, tag="page"):
    """A front's page of metrics."""

    token: int
    text: str


FromFront = Beat | Grant | Void | Watching | Asked | Page
FromReplica = Beat | Claim | Accepted | Refused | News | Lost | Told | Answered | PageAsked


class Codec:
    """Both directions as msgpack."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._front: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromFront)
        self._replica: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromReplica)

    def encode(self, message: FromFront | FromReplica) -> bytes:
        """Return a message's bytes."""
        return self._encoder.encode(message)

    def from_front(self, frame: bytes) -> FromFront:
        """Return what a front sent."""
        found: FromFront = self._front.decode(frame)
        return found

    def from_replica(self, frame: bytes) -> FromReplica:
        """Return what a replica sent."""
        found: FromReplica = self._replica.decode(frame)
        return found
