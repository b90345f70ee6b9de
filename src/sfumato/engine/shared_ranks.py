"""The configurations of ranks that share weights, for whoever starts them one by one. Loads no torch."""

from __future__ import annotations

import socket

import msgspec

from sfumato.config import EngineConfig

_LOOPBACK = "127.0.0.1"


def shared_ranks(config: EngineConfig, size: int) -> list[EngineConfig]:
    """Return one configuration a rank, for engines that are started at the same time on this machine.

    They meet on a free port of the loopback, which rank 0 opens. Somebody else may take the port in between;
    then rank 0 says so and none of them starts.
    """
    with socket.create_server((_LOOPBACK, 0)) as listener:
        address = f"{_LOOPBACK}:{listener.getsockname()[1]}"
    return [
        msgspec.structs.replace(
            config,
            data_parallel_attention=size,
            rank=rank,
            rendezvous=address,
            num_threads=None if config.num_threads is None else max(1, config.num_threads // size),
        )
        for rank in range(size)
    ]
