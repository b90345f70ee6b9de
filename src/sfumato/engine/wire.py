"""What goes over the sockets between an engine process and its parent, and how it is encoded."""

from __future__ import annotations

from typing import Any

import msgspec

from sfumato.core.messages import Message, Turn
from sfumato.core.traits import ImageTraits, ModelTraits
from sfumato.engine.limits import Limits


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, tag="info"):
    """Sent once, when an engine is ready: everything that its parent may tell others about the model.

    algorithms: each decoding algorithm's parameters as `text.decoding.registry.describe` gives them.
    peer_address: where engines reach it that want it to prefill for them.
    """

    name: str
    path: str
    traits: ModelTraits | ImageTraits
    algorithms: dict[str, list[dict[str, Any]]]
    has_tokenizer: bool
    limits: Limits
    num_parameters: int
    num_pages: int
    page_size: int
    dtype: str
    device: str
    peer_address: str | None = None


class Loading(msgspec.Struct, frozen=True, kw_only=True, tag="loading"):
    """Progress of reading a checkpoint: tensors done, tensors in all, bytes read so far."""

    done: int
    total: int
    num_bytes: int


class StartFailure(msgspec.Struct, frozen=True, kw_only=True, tag="failure"):
    """Why an engine could not start, in one line for a person."""

    message: str


class ProfileCommand(msgspec.Struct, frozen=True, kw_only=True, tag="profile"):
    """Record steps from now on (num_steps, or until the next command), or end the recording."""

    token: int
    is_on: bool
    num_steps: int | None = None


class PeersCommand(msgspec.Struct, frozen=True, kw_only=True, tag="peers"):
    """Who works for this engine from now on: (address, shared secret) each; all others are let go."""

    peers: tuple[tuple[str, str], ...]


class Profiled(msgspec.Struct, frozen=True, kw_only=True, tag="profiled"):
    """The answer: the file of a recording that ended, or why the command was refused."""

    token: int
    path: str | None = None
    problem: str | None = None


Command = ProfileCommand | PeersCommand
ToEngine = Message | Command
FromEngine = EngineInfo | Loading | StartFailure | Profiled | Turn

_encoder = msgspec.msgpack.Encoder()
_message_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_news_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def address(folder: str, name: str) -> str:
    """Return the address of the inbox or the outbox of the engine whose sockets lie in a folder."""
    return f"ipc://{folder}/{name}"


def encode(content: ToEngine | FromEngine) -> bytes:
    """Return the msgpack form of anything that crosses."""
    return _encoder.encode(content)


def decode_message(frame: bytes) -> ToEngine:
    """Return what the parent sent."""
    return _message_decoder.decode(frame)


def decode_news(frame: bytes) -> FromEngine:
    """Return what the engine sent."""
    return _news_decoder.decode(frame)
