"""Process groups: where ranks find each other, and collectives whose every wait has a bound.

Groups are values of their own beside torch's default group, so that one process may hold several engines.
Tensors on a CPU go over gloo, those on a GPU over NCCL, messages always over gloo.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from sfumato.errors import ConfigError, EngineError

# Torch's own annotations leave out most of what is used here.
dist: Any = torch.distributed
Store = Any

# A checkpoint of hundreds of gigabytes may take so long to read.
START_SECONDS = 1800.0
_POLL_SECONDS = 0.02
_LOOPBACK = "127.0.0.1"
# One broadcast carries a message up to this size; a longer one takes a second.
_FRAME_BYTES = 4096
_LENGTH_BYTES = 8


class Rendezvous:
    """The store in which ranks announce themselves. address: host:port."""

    def __init__(self, store: Store, address: str) -> None:
        self.store = store
        self.address = address

    @classmethod
    def host(cls) -> Rendezvous:
        """Open a store on a free port of this machine's loopback, which other machines do not reach."""
        listener = socket.create_server((_LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        return cls._served(listener, port)

    @classmethod
    def host_at(cls, address: str) -> Rendezvous:
        """Open a store at an address that the other ranks know already. Raises ConfigError."""
        host, port = split_address(address)
        try:
            return cls._served(socket.create_server((host, port)), port, host)
        except OSError as error:
            raise ConfigError(f"rendezvous {address}: {error}") from error

    @classmethod
    def _served(cls, listener: socket.socket, port: int, host: str = _LOOPBACK) -> Rendezvous:
        store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return cls(store, f"{host}:{port}")

    @classmethod
    def join(cls, address: str, *, seconds: float = START_SECONDS) -> Rendezvous:
        """Connect to a store that another process has opened or is about to. Raises ConfigError."""
        host, port = split_address(address)
        try:
            store = dist.TCPStore(
                host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds)
            )
        except RuntimeError as error:
            raise ConfigError(f"rendezvous {address}: nobody answers: {_first_line(error)}") from error
        return cls(store, address)

    def meet(self, what: str, rank: int, size: int, *, check: Callable[[], None], seconds: float) -> None:
        """Say that this rank has done something and wait until all have.

        check: called while waiting; raises where waiting is pointless. Raises EngineError after `seconds`.
        """
        keys = [f"sfumato/{what}/{other}" for other in range(size)]
        end = time.monotonic() + seconds
        try:
            self.store.set(keys[rank], "here")
            while missing := [other for other, key in enumerate(keys) if not self.store.check([key])]:
                check()
                if time.monotonic() > end:
                    raise EngineError(f"rank {missing[0]} of {size} is not {what} after {seconds:.0f} s")
                time.sleep(_POLL_SECONDS)
        except RuntimeError as error:
            raise EngineError(f"the rank that keeps the rendezvous is gone: {_first_line(error)}") from error


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of host:port. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"rendezvous {address!r} is not host:port")
    return host.strip("[]"), int(port)


class Group:
    """Collectives among ranks. seconds: how long one rank may keep the others waiting.

    name: groups of the same ranks beside each other have different ones."""

    def __init__(
        self, store: Store, *, rank: int, size: int, device: str, seconds: float, name: str = "layers"
    ) -> None:
        self.rank, self.size, self.seconds = rank, size, seconds
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=seconds)
        address = own_address(store)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        self._messages: Any = dist.ProcessGroupGloo(
            dist.PrefixStore(f"sfumato/gloo/{name}", store), rank, size, options
        )
        self._tensors: Any = self._messages
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timedelta(seconds=seconds)
            self._tensors = dist.ProcessGroupNCCL(
                dist.PrefixStore(f"sfumato/nccl/{name}", store), rank, size, nccl
            )

    def _of(self, x: Tensor) -> Any:
        return self._messages if x.device.type == "cpu" else self._tensors

    def _wait(self, start: Callable[[], Any]) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise EngineError(
                f"rank {self.rank} of {self.size} lost the others: one of them has ended or not answered "
                f"for {self.seconds:g} s ({_first_line(error)})"
            ) from error

    def sum_(self, x: Tensor) -> Tensor:
        """Replace x on every rank by the sum of all ranks' x, bitwise the same everywhere."""
        self._wait(lambda: self._of(x).allreduce([x]))
        return x

    def broadcast_(self, x: Tensor) -> Tensor:
        """Replace x by rank 0's."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._wait(lambda: self._of(x).broadcast([x], options))
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Return every rank's x, of one shape, in rank order."""
        found = [torch.empty_like(x) for _ in range(self.size)]
        self._wait(lambda: self._of(x).allgather([found], [x]))
        return found

    def gather(self, x: Tensor) -> list[Tensor]:
        """Return every rank's x, of one shape, on rank 0; nothing elsewhere."""
        options = dist.GatherOptions()
        options.rootRank = 0
        found = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        self._wait(lambda: self._of(x).gather([found] if self.rank == 0 else [], [x], options))
        return found

    def announce(self, content: bytes) -> None:
        """Send a message from rank 0 to all others, which `listen`."""
        frame = torch.zeros(_FRAME_BYTES, dtype=torch.uint8)
        head = len(content).to_bytes(_LENGTH_BYTES, "little") + content[: _FRAME_BYTES - _LENGTH_BYTES]
        frame[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self.broadcast_(frame)
        if rest := content[_FRAME_BYTES - _LENGTH_BYTES :]:
            self.broadcast_(torch.frombuffer(bytearray(rest), dtype=torch.uint8))

    def listen(self) -> bytes:
        """Return what rank 0 announces next; the wait has the group's bound."""
        frame = self.broadcast_(torch.zeros(_FRAME_BYTES, dtype=torch.uint8)).numpy().tobytes()
        length = int.from_bytes(frame[:_LENGTH_BYTES], "little")
        content = frame[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if len(content) < length:
            rest = torch.zeros(length - len(content), dtype=torch.uint8)
            content += self.broadcast_(rest).numpy().tobytes()
        return content


def own_address(store: Store) -> str:
    """Return the address at which the other ranks reach this one: the loopback where the store lies there."""
    host = store.host if isinstance(store, dist.TCPStore) else _LOOPBACK
    if host in (_LOOPBACK, "localhost", "::1"):
        return _LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: the kernel names the interface that would be used.
        probe.connect((host, 1))
        address: str = probe.getsockname()[0]
    return address


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
