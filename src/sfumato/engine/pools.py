"""Prefill and denoise engines of one model as plain processes: replicas that denoise, and their helpers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from sfumato.config import EngineConfig
from sfumato.engine.client import EngineClient, LoadingCallback
from sfumato.engine.replicas import Replicas
from sfumato.errors import ConfigError

_LISTEN = "tcp://127.0.0.1:0"


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """How many processes prefill and how many denoise."""

    num_prefill: int
    num_denoise: int

    @property
    def num_engines(self) -> int:
        """Return how many processes there are."""
        return self.num_prefill + self.num_denoise


def parse_sizes(text: str) -> PoolSizes:
    """Return the pools of "2:1". Raises ConfigError."""
    prefill, _, denoise = text.partition(":")
    if not (prefill.isdigit() and denoise.isdigit() and int(prefill) and int(denoise)):
        raise ConfigError(f"--disaggregate {text!r} is not PREFILL:DENOISE, at least 1:1")
    return PoolSizes(int(prefill), int(denoise))


async def start_pools(
    configs: Sequence[EngineConfig], num_prefill: int, on_loading: LoadingCallback | None = None
) -> Replicas:
    """Start the first engines to prefill, then the others to denoise with their help.

    Requests go to the denoise engines alone, and their outputs come from there. If one engine fails to start,
    none is left. Raises ConfigError or EngineDied.
    """
    secret = secrets.token_hex(32)
    prefill = [
        _with(config, role="prefill", listen=_LISTEN, secret=secret) for config in configs[:num_prefill]
    ]
    helpers = await _start_all(prefill, on_loading)
    try:
        peers = tuple(str(client.info.peer_address) for client in helpers)
        denoise = [
            _with(config, role="denoise", peers=peers, secret=secret) for config in configs[num_prefill:]
        ]
        return await Replicas.start(denoise, on_loading, helpers=helpers)
    except BaseException:
        await asyncio.gather(*(client.close() for client in helpers))
        raise


def _with(config: EngineConfig, **peering: object) -> EngineConfig:
    return msgspec.structs.replace(config, peering=msgspec.structs.replace(config.peering, **peering))


async def _start_all(
    configs: Sequence[EngineConfig], on_loading: LoadingCallback | None
) -> list[EngineClient]:
    """Start engines at the same time; if one fails, the others are ended."""
    tasks = [asyncio.create_task(EngineClient.start(config, on_loading)) for config in configs]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, EngineClient):
                await outcome.close()
        raise
