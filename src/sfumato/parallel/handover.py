"""What every transport of hand-overs has in common: keys and values as bytes, events that wake a loop.

A transport is a control channel (in-process, sockets) that keeps order, and a carrier of keys and values:
copied into messages, or written into the peer's pages (NIXL). Letters: T tokens of some pages, K key-value
heads, D head width.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sfumato.core.handover import Layout, PeerEvent
from sfumato.core.traits import ModelTraits
from sfumato.errors import EngineError
from sfumato.models.batch import KVStore

# What a fingerprint reads of each file of a checkpoint.
_SAMPLES = 256
_SAMPLE_BYTES = 64


class Mailbox:
    """Events for one loop from any thread; reading `fileno` becomes possible when one arrives."""

    def __init__(self) -> None:
        self._events: deque[PeerEvent] = deque()
        self._lock = threading.Lock()
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._is_closed = False

    def put(self, event: PeerEvent) -> None:
        """Add an event and wake whoever waits; after `close`, nothing happens."""
        with self._lock:
            if self._is_closed:
                return
            self._events.append(event)
            if len(self._events) == 1:
                self._write.send(b"\0")

    def take(self) -> list[PeerEvent]:
        """Return what has come since the last call, in order."""
        with self._lock:
            events = list(self._events)
            self._events.clear()
            if events and not self._is_closed:
                self._read.recv(64)
        return events

    def fileno(self) -> int:
        """Return what to poll for reading."""
        return self._read.fileno()

    def close(self) -> None:
        """Take no more events."""
        with self._lock:
            self._is_closed = True
            self._read.close()
            self._write.close()


class Endpoint(Protocol):
    """One engine's end of all its links."""

    @property
    def mailbox(self) -> Mailbox:
        """Return where the peers' events come in."""
        ...

    @property
    def address(self) -> str | None:
        """Return where peers reach this engine, if they do."""
        ...

    def meet(self, peers: Sequence[tuple[str, str]]) -> None:
        """Connect to these (address, shared secret) and end the links to all others."""
        ...

    def close(self) -> None:
        """End all links and whatever runs for them, within a bounded time."""
        ...


class Carrier(Protocol):
    """How keys and values come into a peer's pages."""

    @property
    def name(self) -> str:
        """Return what both sides must agree on."""
        ...

    @property
    def is_fenced(self) -> bool:
        """Whether nothing is written that the receiver does not write itself."""
        ...

    def describe(self) -> bytes:
        """Return what a peer must know to write here."""
        ...

    def attach(self, description: bytes) -> str:
        """Learn how to write to a peer; return its name for `push`. Raises PeerRefused."""
        ...

    def push(self, peer: str, pages: Sequence[int], peer_pages: Sequence[int]) -> bytes | bytearray | None:
        """Return the keys and values of own pages, or write them to the peer's and return None.

        Raises OSError if the peer cannot be written to.
        """
        ...

    def detach(self, peer: str) -> None:
        """Forget a peer that has gone."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class KVPages:
    """Copies pages of a store to bytes and back: per layer keys, then values, [T, K, D] each.

    store: None where a test's model keeps nothing; then there are no bytes.
    """

    def __init__(self, store: KVStore | None, page_size: int) -> None:
        self._tensors: tuple[Tensor, ...] = ()
        if store is not None:
            pairs = zip(store.keys, store.values, strict=True)
            self._tensors = tuple(tensor for pair in pairs for tensor in pair)
        self._page_size = page_size

    def num_bytes(self, num_pages: int) -> int:
        """Return how many bytes so many pages take."""
        per_token = sum(tensor[0].numel() * tensor.element_size() for tensor in self._tensors)
        return num_pages * self._page_size * per_token

    def pack(self, pages: Sequence[int]) -> bytearray:
        """Return the keys and values of pages in order."""
        payload = bytearray(self.num_bytes(len(pages)))
        content, offset = np.frombuffer(payload, dtype=np.uint8), 0
        slots = self._slots(pages)
        for tensor in self._tensors:
            part = tensor[slots.to(tensor.device)].cpu().contiguous().view(torch.uint8).flatten()
            content[offset : offset + part.numel()] = part.numpy()
            offset += part.numel()
        return payload

    def unpack(self, pages: Sequence[int], payload: bytes | bytearray | memoryview) -> None:
        """Write keys and values to pages, in place. Raises EngineError if the payload has another size."""
        if len(payload) != self.num_bytes(len(pages)):
            raise EngineError(
                f"{len(pages)} pages take {self.num_bytes(len(pages))} bytes, {len(payload)} have come"
            )
        if not self._tensors or not pages:
            return
        content = torch.frombuffer(
            bytearray(payload) if isinstance(payload, bytes) else payload, dtype=torch.uint8
        )
        slots, offset = self._slots(pages), 0
        for tensor in self._tensors:
            shape = (len(slots), *tensor.shape[1:])
            size = tensor[0].numel() * tensor.element_size() * len(slots)
            # A slice of a byte buffer may begin where a wider number may not.
            part = content[offset : offset + size].clone().view(tensor.dtype).view(shape)
            tensor[slots.to(tensor.device)] = part.to(tensor.device)
            offset += size

    def _slots(self, pages: Sequence[int]) -> Tensor:
        table = torch.tensor(list(pages), dtype=torch.int64)
        return (table[:, None] * self._page_size + torch.arange(self._page_size)).flatten()


class CopyCarrier:
    """Keys and values travel in messages; the receiver writes them itself."""

    name = "copy"
    is_fenced = True

    def __init__(self, pages: KVPages) -> None:
        self._pages = pages

    def describe(self) -> bytes:
        """Nothing need be known."""
        return b""

    def attach(self, description: bytes) -> str:
        """Nothing need be learned."""
        return ""

    def push(self, peer: str, pages: Sequence[int], peer_pages: Sequence[int]) -> bytearray:
        """Return the keys and values of own pages."""
        return self._pages.pack(pages)

    def detach(self, peer: str) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def make_layout(
    name: str, folder: Path, traits: ModelTraits, *, dtype: torch.dtype, page_size: int, transport: str
) -> Layout:
    """Return what a peer must have in common with this engine; folder: of the checkpoint."""
    return Layout(
        model=name,
        fingerprint=fingerprint(folder),
        dtype=str(dtype).removeprefix("torch."),
        page_size=page_size,
        block_length=traits.block_length,
        kv_shapes=traits.layer_kv_shapes,
        transport=transport,
    )


def fingerprint(folder: Path) -> str:
    """Return a short digest of a checkpoint: of its files' sizes and of bytes spread evenly over each.

    Read from the files, since memory holds weights as this machine's kernels want them. Other weights, even
    of the same shapes, differ in some of these bytes.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}".encode())
        with path.open("rb") as file:
            for place in range(_SAMPLES):
                file.seek(size * place // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
