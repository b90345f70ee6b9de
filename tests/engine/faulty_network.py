"""A proxy between two engines that delays, drops and doubles their frames; the greetings pass untouched."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

_HEAD = struct.Struct(">IQ")
_HAS_PAYLOAD = 1 << 63
# Frames of each direction before the first message.
_GREETINGS = 2


@dataclass
class FaultyNetwork:
    """Listens on loopback for one engine and passes its frames on to another.

    drop, double: of each frame, the chance of it. max_delay: seconds; frames keep their order.
    """

    host: str
    port: int
    seed: int
    drop: float = 0.0
    double: float = 0.0
    max_delay: float = 0.0
    num_dropped: int = 0
    num_doubled: int = 0
    _sockets: list[socket.socket] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets.append(self._listener)
        self._start(self._accept)

    @property
    def address(self) -> str:
        """Return where to connect instead."""
        return f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def _start(self, work, *arguments) -> None:  # type: ignore[no-untyped-def]
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((self.host, self.port))
                self._sockets += [near, far]
                self._start(self._pass, near, far)
                self._start(self._pass, far, near)

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        """Pass frames on until either side ends the connection, then end both."""
        number = 0
        with contextlib.suppress(OSError, EOFError):
            while True:
                frame = _frame(source)
                number += 1
                for _ in range(1 if number <= _GREETINGS else self._copies()):
                    target.sendall(frame)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _copies(self) -> int:
        with self._lock:
            lot, delay = self._rng.random(), self._rng.uniform(0, self.max_delay)
        time.sleep(delay)
        if lot < self.drop:
            self.num_dropped += 1
            return 0
        if lot < self.drop + self.double:
            self.num_doubled += 1
            return 2
        return 1

    def close(self) -> None:
        """End all connections."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(5)


def _frame(source: socket.socket) -> bytes:
    """Return the next frame, whole."""
    head = _bytes(source, _HEAD.size)
    header_size, size = _HEAD.unpack(head)
    return head + _bytes(source, header_size + (size & ~_HAS_PAYLOAD))


def _bytes(source: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = source.recv(size - len(content))
        if not part:
            raise EOFError
        content += part
    return content
