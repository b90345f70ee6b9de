"""Waking ranks that sleep: a connection between every two ranks, which also tells when one of them is gone.

A ring carries the number of the agreement that its sender is about to enter. A rank that has passed that
agreement already ignores it: a ring that comes late wakes nobody for nothing.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from typing import Any

from sfumato.errors import EngineError
from sfumato.parallel.groups import own_address, split_address

_RING = struct.Struct("<q")
_CONNECT_SECONDS = 60.0
_READ_BYTES = 4096
# After a broken collective, the end of the peer that broke it is on its way.
_LAST_WORDS_SECONDS = 0.5


class Bell:
    """This rank's connections to the others. number: agreements that this rank has entered so far."""

    def __init__(self, peers: dict[int, socket.socket]) -> None:
        self.number = 0
        self._peers = peers
        self._unread = dict.fromkeys(peers, b"")
        self._latest = 0

    @classmethod
    def connect(cls, store: Any, rank: int, size: int) -> Bell:
        """Connect to every other rank. Raises EngineError where one does not come."""
        peers: dict[int, socket.socket] = {}
        try:
            with socket.create_server((own_address(store), 0), backlog=size) as listener:
                listener.settimeout(_CONNECT_SECONDS)
                host, port = listener.getsockname()[:2]
                store.set(f"sfumato/bell/{rank}", f"{host}:{port}")
                for other in range(rank):
                    address = split_address(store.get(f"sfumato/bell/{other}").decode())
                    peers[other] = socket.create_connection(address, _CONNECT_SECONDS)
                    peers[other].sendall(_RING.pack(rank))
                for _ in range(rank + 1, size):
                    peer, _ = listener.accept()
                    peer.settimeout(_CONNECT_SECONDS)
                    peers[_RING.unpack(peer.recv(_RING.size, socket.MSG_WAITALL))[0]] = peer
        except (OSError, RuntimeError, struct.error) as error:
            raise EngineError(f"rank {rank} of {size} could not connect to the others: {error}") from error
        for peer in peers.values():
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.setblocking(False)
        return cls(peers)

    @property
    def sockets(self) -> list[socket.socket]:
        """Return what is readable when the bell may have rung."""
        return list(self._peers.values())

    @property
    def is_rung(self) -> bool:
        """Whether somebody is about to enter an agreement that this rank has not entered yet."""
        return self._latest > self.number

    def ring(self) -> None:
        """Wake every other rank for the agreement that this rank has just entered."""
        for peer in self._peers.values():
            try:
                peer.send(_RING.pack(self.number))
            except BlockingIOError:
                # Thousands of unread rings: that rank stands still, which the agreement will find out.
                continue
            except OSError:
                # It is gone; whoever reads or agrees next says so.
                continue

    def read(self) -> None:
        """Take in what has been rung. Raises EngineError where a rank has ended."""
        for rank, peer in self._peers.items():
            try:
                while found := peer.recv(_READ_BYTES):
                    self._unread[rank] += found
                raise EngineError(f"rank {rank} has ended")
            except BlockingIOError:
                pass
            except OSError as error:
                raise EngineError(f"rank {rank} has ended ({error})") from error
            whole = len(self._unread[rank]) // _RING.size * _RING.size
            for (number,) in _RING.iter_unpack(self._unread[rank][:whole]):
                self._latest = max(self._latest, number)
            self._unread[rank] = self._unread[rank][whole:]

    def explain(self, error: EngineError) -> EngineError:
        """Return an error that names the rank that has ended, where one has; else the error itself."""
        end = time.monotonic() + _LAST_WORDS_SECONDS
        while (left := end - time.monotonic()) > 0:
            if select.select(self.sockets, [], [], left)[0]:
                try:
                    self.read()
                except EngineError as ended:
                    return ended
        return error

    def close(self) -> None:
        """Close every connection."""
        for peer in self._peers.values():
            peer.close()
