"""Engines of one model as plain processes: replicas that denoise, and their helpers."""

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
    """The roles of the processes that help, and how many denoise."""

    helper_roles: tuple[str, ...]
    num_denoise: int

    @property
    def num_engines(self) -> int:
        """Return how many processes there are."""
        return len(self.helper_roles) + self.num_denoise


def parse_sizes(text: str) -> PoolSizes:
    """Return the pools of "2:1", or of "1:2:1" for images. Raises ConfigError."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(
            f"--disaggregate {text!r} is not PREFILL:DENOISE from 1:1, nor ENCODE:DENOISE:DECODE for images"
        )
    sizes = [int(part) for part in parts]
    if len(sizes) == 2:
        return PoolSizes(("prefill",) * sizes[0], sizes[1])
    return PoolSizes(("encode",) * sizes[0] + ("decode",) * sizes[2], sizes[1])


async def start_pools(
    configs: Sequence[EngineConfig], helper_roles: Sequence[str], on_loading: LoadingCallback | None = None
) -> Replicas:
    """Start the first engines with the roles of helpers, then the others to denoise with their help.

    Requests go to the denoise engines alone, and their outputs come from there. If one engine fails to start,
    none is left. Raises ConfigError or EngineDied.
    """
    secret = secrets.token_hex(32)
    helping = [
        _with(config, role=role, listen=_LISTEN, secret=secret)
        for config, role in zip(configs, helper_roles, strict=False)
    ]
    helpers = await _start_all(helping, on_loading)
    try:
        peers = tuple(str(client.info.peer_address) for client in helpers)
        denoise = [
            _with(config, role="denoise", peers=peers, secret=secret)
            for config in configs[len(helper_roles) :]
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
