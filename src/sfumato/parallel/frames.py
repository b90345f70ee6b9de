"""Frames on a TCP connection, and the handshake that begins one.

A frame is the length of its header, the length of its payload, the header (msgpack), the payload (raw bytes).
Both sides prove that they know the secret by a keyed digest over both sides' random numbers and what they say
of themselves; the secret itself is never sent. What follows is neither encrypted nor signed: the network
between engines must be one that is trusted with their contents.
"""

from __future__ import annotations

import hmac
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable

import msgspec

from sfumato.core.handover import Layout, PeerMessage
from sfumato.errors import PeerRefused

_HEAD = struct.Struct(">IQ")
_MAX_HEADER = 64 << 20
_MAX_PAYLOAD = 4 << 30
# A stranger may send no more than this before it has proved itself, and gets so many seconds.
_MAX_GREETING = 1 << 20
_HANDSHAKE_SECONDS = 5.0
_VERSION = 1
# A payload of no bytes is not the same as none.
_HAS_PAYLOAD = 1 << 63


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Nothing to say, but still there."""


Frame = PeerMessage | Beat


class _Greeting(msgspec.Struct, frozen=True, kw_only=True):
    """What each side says of itself; proof: hex digest, empty in the first one."""

    version: int = _VERSION
    nonce: str
    layout: bytes = b""
    carrier: bytes = b""
    proof: str = ""
    refusal: str = ""


class Closed(OSError):
    """The other side has closed the connection."""


class Malformed(OSError):
    """The other side sends what is none of ours, or nothing where it must introduce itself."""


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


class Connection:
    """Frames over one TCP connection; one thread reads, one writes. heard_at: when bytes last came."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
        self._socket = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self.heard_at = time.monotonic()

    def write(self, frame: Frame, payload: bytes | bytearray | None = None) -> None:
        """Send one frame; waits while the other side does not read. Raises OSError."""
        self._write(_encoder.encode(frame), payload)

    def _write(self, header: bytes, payload: bytes | bytearray | None = None) -> None:
        size = 0 if payload is None else len(payload) | _HAS_PAYLOAD
        self._socket.sendall(_HEAD.pack(len(header), size) + header)
        if payload:
            self._socket.sendall(payload)

    def read(self, idle: Callable[[], None], seconds: float) -> tuple[Frame, bytearray | None]:
        """Return the next frame and its payload; `idle` is called whenever nothing came for some seconds.

        Raises OSError when the connection has ended or brings what is no frame.
        """
        header, payload = self._read(_MAX_HEADER, _MAX_PAYLOAD, idle, seconds)
        try:
            return _decoder.decode(header), payload
        except msgspec.MsgspecError as error:
            raise Malformed(f"sent a message that is none of ours: {error}") from error

    def _read(
        self, max_header: int, max_payload: int, idle: Callable[[], None], seconds: float
    ) -> tuple[bytearray, bytearray | None]:
        header_size, size = _HEAD.unpack(self._read_bytes(_HEAD.size, idle, seconds))
        payload_size = size & ~_HAS_PAYLOAD
        if header_size > max_header or payload_size > max_payload:
            raise Malformed(f"sent a frame of {header_size} + {payload_size} bytes")
        header = self._read_bytes(header_size, idle, seconds)
        payload = self._read_bytes(payload_size, idle, seconds) if size & _HAS_PAYLOAD else None
        return header, payload

    def _read_bytes(self, size: int, idle: Callable[[], None], seconds: float) -> bytearray:
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size:
            if not self._poll.poll(max(1, int(seconds * 1000))):
                idle()
                continue
            count = self._socket.recv_into(view[done:])
            if not count:
                raise Closed("closed the connection")
            self.heard_at = time.monotonic()
            done += count
        return content

    def exchange(self, greeting: bytes | None) -> bytes:
        """Send a greeting if there is one; return the other side's. Raises OSError, also when it is late."""
        if greeting is not None:
            self._write(greeting)
        end = time.monotonic() + _HANDSHAKE_SECONDS

        def check() -> None:
            if time.monotonic() > end:
                raise Malformed(f"did not introduce itself within {_HANDSHAKE_SECONDS:g} seconds")

        return bytes(self._read(_MAX_GREETING, 0, check, 0.1)[0])

    def greet(self, greeting: bytes) -> None:
        """Send a greeting that needs no answer."""
        self._write(greeting)

    def shut(self) -> None:
        """Wake both threads: reading and writing fail from now on."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The other side was faster.
            return

    def close(self) -> None:
        """Give the connection back."""
        self._socket.close()


def introduce(connection: Connection, secret: bytes, layout: Layout, carrier: bytes) -> bytes:
    """Greet a listening peer; return what its carrier says. Raises PeerRefused, OSError."""
    nonce = secrets.token_hex(16)
    first = _decode(connection.exchange(_encoder.encode(_Greeting(nonce=nonce))))
    own = _Greeting(nonce=nonce, layout=msgspec.json.encode(layout), carrier=carrier)
    proof = _proof(secret, "asks", first.nonce, own)
    answer = _decode(connection.exchange(_encoder.encode(msgspec.structs.replace(own, proof=proof))))
    if answer.refusal:
        raise PeerRefused(answer.refusal)
    if not hmac.compare_digest(answer.proof, _proof(secret, "answers", nonce, answer)):
        raise PeerRefused("the peer does not know the shared secret")
    return answer.carrier


def answer(connection: Connection, secret: bytes, layout: Layout, carrier: bytes) -> bytes:
    """Let a peer prove itself; return what its carrier says. Raises PeerRefused, OSError."""
    hello = _decode(connection.exchange(None))
    nonce = secrets.token_hex(16)
    theirs = _decode(connection.exchange(_encoder.encode(_Greeting(nonce=nonce))))
    refusal = _objection(secret, nonce, theirs, layout)
    own = _Greeting(nonce=nonce, layout=msgspec.json.encode(layout), carrier=carrier, refusal=refusal)
    if refusal:
        connection.greet(_encoder.encode(_Greeting(nonce=nonce, refusal=refusal)))
        raise PeerRefused(refusal)
    proof = _proof(secret, "answers", hello.nonce, own)
    connection.greet(_encoder.encode(msgspec.structs.replace(own, proof=proof)))
    return theirs.carrier


def _objection(secret: bytes, nonce: str, theirs: _Greeting, layout: Layout) -> str:
    if not hmac.compare_digest(theirs.proof, _proof(secret, "asks", nonce, theirs)):
        return "wrong shared secret (SFUMATO_PEER_SECRET)"
    try:
        difference = layout.difference(msgspec.json.decode(theirs.layout, type=Layout))
    except msgspec.MsgspecError as error:
        return f"a layout that cannot be read: {error}"
    return difference or ""


def _proof(secret: bytes, purpose: str, challenge: str, said: _Greeting) -> str:
    content = _encoder.encode([purpose, challenge, said.nonce, said.layout, said.carrier])
    return hmac.digest(secret, content, "sha256").hex()


def _decode(content: bytes) -> _Greeting:
    try:
        greeting = msgspec.msgpack.decode(content, type=_Greeting)
    except msgspec.MsgspecError as error:
        raise Malformed(f"is no engine of ours: {error}") from error
    if greeting.version != _VERSION:
        raise PeerRefused(f"the peer speaks version {greeting.version} of the hand-over, not {_VERSION}")
    return greeting
