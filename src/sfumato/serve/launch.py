"""Starting the engines of a server: what each of them may take of the machine, and their progress."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from sfumato.config import EngineConfig
from sfumato.engine.peer_config import PeerConfig
from sfumato.engine.pools import PoolSizes, start_pools
from sfumato.engine.profile_config import ProfileConfig
from sfumato.engine.replicas import Replicas
from sfumato.engine.wire import Loading
from sfumato.errors import ConfigError

if TYPE_CHECKING:
    from sfumato.serve.registry import Registry

# Called with (served name, progress of its checkpoint).
ProgressCallback = Callable[[str, Loading], None]


@dataclass(frozen=True, slots=True)
class Planned:
    """One model to start; name: what clients call it, None for the checkpoint's own name.

    helper_roles: of its first engines, which work for the others. shares_weights: the others hold the
    divided layers together.
    """

    config: EngineConfig
    name: str | None = None
    helper_roles: tuple[str, ...] = ()
    shares_weights: bool = False

    def with_peers(self, peering: PeerConfig, pools: PoolSizes | None) -> Planned:
        """Return the same model with its part in prefill and denoise apart. Raises ConfigError."""
        config = msgspec.structs.replace(self.config, peering=peering)
        if peering.listen is not None and config.num_replicas != 1:
            raise ConfigError(f"--data-parallel {config.num_replicas} engines cannot share {peering.listen}")
        if pools is None:
            return replace(self, config=config)
        if config.num_replicas != 1:
            raise ConfigError(
                f"--data-parallel {config.num_replicas} does not go with --disaggregate, which says how many "
                "engines denoise"
            )
        if config.tensor_parallel != 1:
            raise ConfigError(
                f"--tensor-parallel {config.tensor_parallel} does not go with --disaggregate: "
                "each rank would hand over its own part of keys and values"
            )
        config = msgspec.structs.replace(config, num_replicas=pools.num_engines)
        return replace(self, config=config, helper_roles=pools.helper_roles)

    def with_profile(self, profile: ProfileConfig | None) -> Planned:
        """Return the same model with its steps recorded."""
        return replace(self, config=msgspec.structs.replace(self.config, profile=profile))

    def replicas(self) -> list[EngineConfig]:
        """Return the configuration of each of its engines; CPU threads and given memory are shared out."""
        config, count = self.config, self.config.num_replicas
        num_threads = config.num_threads
        if num_threads is None and count > 1:
            num_threads = len(os.sched_getaffinity(0))
        size = count - len(self.helper_roles)
        if self.shares_weights and size < 2:
            raise ConfigError(f"--data-parallel-attention needs two engines at least that share, not {size}")
        rendezvous = f"127.0.0.1:{_free_port()}" if self.shares_weights else config.rendezvous
        return [
            msgspec.structs.replace(
                config,
                replica=replica,
                rank=replica - len(self.helper_roles) if self._shares(replica) else config.rank,
                data_parallel_attention=size if self._shares(replica) else 1,
                rendezvous=rendezvous,
                kv_memory=None if config.kv_memory is None else config.kv_memory // count,
                num_threads=None if num_threads is None else max(1, num_threads // count),
            )
            for replica in range(count)
        ]

    def _shares(self, replica: int) -> bool:
        return self.shares_weights and replica >= len(self.helper_roles)

    @property
    def label(self) -> str:
        """Return what to call it before it is loaded."""
        return self.name or self.config.model


def _free_port() -> int:
    """Return a port of this machine that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def share_out(planned: Sequence[Planned], *, kv_memory: int | None, num_threads: int | None) -> list[Planned]:
    """Divide KV memory (bytes) and CPU threads among engines; what one asks for itself stands."""
    count = len(planned)
    if kv_memory is not None:
        kv_memory //= count
    if num_threads is not None:
        num_threads = max(1, num_threads // count)
    elif count > 1:
        num_threads = max(1, len(os.sched_getaffinity(0)) // count)
    shared = []
    for each in planned:
        config = msgspec.structs.replace(
            each.config,
            kv_memory=kv_memory if each.config.kv_memory is None else each.config.kv_memory,
            memory_share=each.config.memory_share / count,
            num_threads=num_threads if each.config.num_threads is None else each.config.num_threads,
        )
        shared.append(replace(each, config=config))
    return shared


async def start_models(planned: Sequence[Planned], on_progress: ProgressCallback) -> Registry:
    """Start every engine at the same time and wait for all; if one fails, the others are ended.

    Raises ConfigError or EngineDied.
    """
    started = [(each, each.replicas()) for each in planned]
    for config in itertools.chain.from_iterable(configs for _, configs in started):
        config.check()
    tasks = [asyncio.create_task(_start(each, configs, on_progress)) for each, configs in started]
    try:
        clients = await asyncio.gather(*tasks)
        # Imported once the engines are under way: it takes a while.
        from sfumato.serve.registry import Registry, ServedModel

        models = [
            ServedModel(each.name or client.info.name, client)
            for each, client in zip(planned, clients, strict=True)
        ]
        twice = [model.name for model in models if sum(other.name == model.name for other in models) > 1]
        if twice:
            raise ConfigError(f"two models are called {twice[0]!r}; tell them apart with --served-model-name")
    except BaseException:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            match outcome:
                case Replicas():
                    await outcome.close()
        raise
    return Registry(models)


async def _start(
    planned: Planned, configs: Sequence[EngineConfig], on_progress: ProgressCallback
) -> Replicas:
    on_loading = lambda loading: on_progress(planned.label, loading)
    if planned.helper_roles:
        return await start_pools(configs, planned.helper_roles, on_loading)
    return await Replicas.start(configs, on_loading)
