"""Keys and values written straight into a peer's pages by NIXL: shared memory, RDMA or NVLink as UCX finds.

An extra (`sfumato[nixl]`), imported only where it is asked for. Tried on CPUs over UCX; the code says nothing
of CPUs, but has not run on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sfumato.errors import ConfigError, PeerRefused
from sfumato.models.batch import KVStore

# A peer that does not take a write for so long has stopped; the loop waits no longer for it.
_TRANSFER_SECONDS = 5.0
_POLL_SECONDS = 0.0001
_PROGRESS_SECONDS = 0.001


class _Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Where an engine's pages lie. addresses, page_bytes: of each layer's keys, then values."""

    agent: bytes
    kind: str
    device: int
    addresses: tuple[int, ...]
    page_bytes: tuple[int, ...]
    num_pages: int


@dataclass(frozen=True, slots=True)
class _Peer:
    """A peer's agent and memory."""

    name: str
    memory: _Memory


class NixlCarrier:
    """Writes own pages to the same layers of a peer's pages.

    Nothing fences such writes: pages that a peer may write to are used again only when it has said that it
    has stopped, or is gone.
    """

    name = "nixl"
    is_fenced = False

    def __init__(self, store: KVStore, page_size: int) -> None:
        api = _import()
        # Links are made in threads of their own while the loop writes.
        # NIXL's own progress thread never sleeps: on a CPU it takes a core from the forwards.
        config = api.nixl_agent_config(
            enable_prog_thread=False, sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        self._agent: Any = api.nixl_agent(f"sfumato-{secrets.token_hex(8)}", config)
        tensors = [tensor for pair in zip(store.keys, store.values, strict=True) for tensor in pair]
        self._registered = self._agent.register_memory(tensors)
        self._memory = _Memory(
            agent=self._agent.get_agent_metadata(),
            kind="DRAM" if tensors[0].device.type == "cpu" else "VRAM",
            device=max(0, tensors[0].get_device()),
            addresses=tuple(tensor.data_ptr() for tensor in tensors),
            page_bytes=tuple(_token_bytes(tensor) * page_size for tensor in tensors),
            num_pages=tensors[0].shape[0] // page_size,
        )
        self._lock = threading.Lock()
        self._peers: dict[str, _Peer] = {}
        self._is_closing = threading.Event()
        self._progress = threading.Thread(target=self._make_progress, name="nixl", daemon=True)
        self._progress.start()

    def describe(self) -> bytes:
        """Return this engine's agent and where its pages lie."""
        return msgspec.msgpack.encode(self._memory)

    def attach(self, description: bytes) -> str:
        """Learn a peer's agent and where its pages lie. Raises PeerRefused."""
        try:
            memory = msgspec.msgpack.decode(description, type=_Memory)
        except msgspec.MsgspecError as error:
            raise PeerRefused(f"the peer has no NIXL memory: {error}") from error
        if memory.page_bytes != self._memory.page_bytes:
            raise PeerRefused(f"pages take {memory.page_bytes} bytes there, {self._memory.page_bytes} here")
        try:
            found = self._agent.add_remote_agent(memory.agent)
        except Exception as error:  # NIXL's errors have no common base of their own
            raise PeerRefused(f"NIXL cannot reach the peer: {error}") from error
        name = found.decode() if isinstance(found, bytes) else str(found)
        with self._lock:
            self._peers[name] = _Peer(name, memory)
        return name

    def push(self, peer: str, pages: Sequence[int], peer_pages: Sequence[int]) -> None:
        """Write own pages to the peer's and wait until they are there. Raises OSError."""
        # Held while it writes: who detaches a peer waits for the end of what is being written to it.
        with self._lock:
            found = self._peers.get(peer)
            if found is None:
                raise OSError(f"NIXL agent {peer} has gone")
            if any(not 0 <= page < found.memory.num_pages for page in peer_pages):
                raise OSError(f"the peer named a page beyond its {found.memory.num_pages}")
            try:
                self._write(found, _places(self._memory, pages), _places(found.memory, peer_pages))
            except OSError:
                raise
            except Exception as error:  # NIXL's errors have no common base of their own
                raise OSError(f"NIXL cannot write to the peer: {error}") from error

    def _write(self, peer: _Peer, own: NDArray[np.uint64], theirs: NDArray[np.uint64]) -> None:
        agent = self._agent
        handle = agent.initialize_xfer(
            "WRITE",
            agent.get_xfer_descs(own, self._memory.kind),
            agent.get_xfer_descs(theirs, peer.memory.kind),
            peer.name,
        )
        try:
            state, end = agent.transfer(handle), time.monotonic() + _TRANSFER_SECONDS
            while state == "PROC" and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
                state = agent.check_xfer_state(handle)
        finally:
            agent.release_xfer_handle(handle)
        if state != "DONE":
            late = f"not through within {_TRANSFER_SECONDS:g} seconds"
            raise OSError(f"NIXL write: {late if state == 'PROC' else state}")

    def detach(self, peer: str) -> None:
        """Cut the connection to a peer; nothing is written to it any more."""
        with self._lock:
            found = self._peers.pop(peer, None)
        if found is not None:
            # It may have gone first.
            with contextlib.suppress(Exception):
                self._agent.remove_remote_agent(found.name)

    def close(self) -> None:
        """Let the memory go."""
        self._is_closing.set()
        self._progress.join()
        for peer in list(self._peers):
            self.detach(peer)
        self._agent.deregister_memory(self._registered)

    def _make_progress(self) -> None:
        """Let peers write here where that takes a hand of ours, as connecting does, and TCP always."""
        while not self._is_closing.wait(_PROGRESS_SECONDS):
            if self._peers:
                self._agent.get_new_notifs()


def _import() -> Any:
    try:
        api = importlib.import_module("nixl._api")
    except ImportError as error:
        raise ConfigError(
            f"--peer-transport nixl needs the extra sfumato[nixl], on a machine without CUDA "
            f"`pip install --no-deps nixl nixl-cu12`: {error}"
        ) from error
    # It tells of every agent on standard output, where an operator reads where we listen.
    logging.getLogger("nixl").setLevel(logging.WARNING)
    return api


def _token_bytes(tensor: Tensor) -> int:
    return tensor[0].numel() * tensor.element_size()


def _places(memory: _Memory, pages: Sequence[int]) -> NDArray[np.uint64]:
    """Return u64[layers * 2 * pages, 3]: address, bytes and device of every page of every layer."""
    bases = np.asarray(memory.addresses, dtype=np.uint64)[:, None]
    sizes = np.asarray(memory.page_bytes, dtype=np.uint64)[:, None]
    addresses = bases + np.asarray(pages, dtype=np.uint64)[None, :] * sizes
    places = np.empty((addresses.size, 3), dtype=np.uint64)
    places[:, 0] = addresses.ravel()
    places[:, 1] = np.broadcast_to(sizes, addresses.shape).ravel()
    places[:, 2] = memory.device
    return places
