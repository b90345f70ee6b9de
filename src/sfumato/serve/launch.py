"""Starting the engines of a server: what each of them may take of the machine, and their progress."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from sfumato.config import EngineConfig
from sfumato.engine.client import EngineClient
from sfumato.engine.peer_config import PeerConfig
from sfumato.engine.pools import Pools, PoolSizes
from sfumato.engine.wire import Loading
from sfumato.errors import ConfigError
from sfumato.serve.registry import Registry, ServedModel

# Called with (served name, progress of its checkpoint).
ProgressCallback = Callable[[str, Loading], None]


@dataclass(frozen=True, slots=True)
class Planned:
    """One model to start; name: what clients call it, None for the checkpoint's own name.

    pools: prefill and denoise engines for it; None: one engine.
    """

    config: EngineConfig
    name: str | None = None
    pools: PoolSizes | None = None

    @property
    def num_engines(self) -> int:
        """Return how many processes it takes."""
        return 1 if self.pools is None else self.pools.num_engines

    def with_peers(self, peering: PeerConfig, pools: PoolSizes | None) -> Planned:
        """Return the same model with its part in prefill and denoise apart."""
        return replace(self, config=msgspec.structs.replace(self.config, peering=peering), pools=pools)

    @property
    def label(self) -> str:
        """Return what to call it before it is loaded."""
        return self.name or self.config.model


def share_out(planned: Sequence[Planned], *, kv_memory: int | None, num_threads: int | None) -> list[Planned]:
    """Divide KV memory (bytes) and CPU threads among engines; what one asks for itself stands."""
    count = sum(each.num_engines for each in planned)
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
    for each in planned:
        each.config.check()
    tasks = [asyncio.create_task(_start(each, on_progress)) for each in planned]
    try:
        models = await asyncio.gather(*tasks)
        twice = [model.name for model in models if sum(other.name == model.name for other in models) > 1]
        if twice:
            raise ConfigError(f"two models are called {twice[0]!r}; tell them apart with --served-model-name")
    except BaseException:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            match outcome:
                case ServedModel():
                    await outcome.close()
        raise
    return Registry(models)


async def _start(planned: Planned, on_progress: ProgressCallback) -> ServedModel:
    on_loading = lambda loading: on_progress(planned.label, loading)
    client: EngineClient | Pools
    if planned.pools is None:
        client = await EngineClient.start(planned.config, on_loading)
    else:
        client = await Pools.start(planned.config, planned.pools, on_loading)
    try:
        return ServedModel(planned.name or client.info.name, client)
    except BaseException:
        await client.close()
        raise
