"""Prefill and denoise engines of one model as plain processes, behind the interface of a single engine."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from sfumato.config import EngineConfig
from sfumato.core.messages import Gauges, Submit, Turn
from sfumato.engine.client import EngineClient, LoadingCallback, Outputs, TurnCallback
from sfumato.engine.peer_config import PeerConfig
from sfumato.engine.wire import EngineInfo
from sfumato.errors import ConfigError, EngineDied

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


class Pools:
    """Requests go to a denoise engine, which asks prefill engines itself; outputs come from it alone.

    A prefill engine that has gone is not missed: prompts are prefilled by the others, or where they are
    denoised. A denoise engine that has gone ends its requests; new ones go to the others.
    """

    def __init__(self, prefills: Sequence[EngineClient], denoises: Sequence[EngineClient]) -> None:
        self.prefills = tuple(prefills)
        self.denoises = tuple(denoises)
        self._gauges: dict[int, Gauges] = {}
        self._on_turn: TurnCallback | None = None

    @classmethod
    async def start(
        cls, config: EngineConfig, sizes: PoolSizes, on_loading: LoadingCallback | None = None
    ) -> Pools:
        """Start the prefill engines, then the denoise engines that know them; if one fails, none is left.

        Raises ConfigError or EngineDied.
        """
        started: list[EngineClient] = []
        secret = secrets.token_hex(32)
        peering = config.peering
        prefill = msgspec.structs.replace(peering, role="prefill", listen=_LISTEN, secret=secret)
        try:
            prefills = await _start_all(config, prefill, sizes.num_prefill, started, on_loading)
            addresses = tuple(str(client.info.peer_address) for client in prefills)
            denoise = msgspec.structs.replace(peering, role="denoise", peers=addresses, secret=secret)
            denoises = await _start_all(config, denoise, sizes.num_denoise, started, on_loading)
        except BaseException:
            await asyncio.gather(*(client.close() for client in started))
            raise
        return cls(prefills, denoises)

    @property
    def info(self) -> EngineInfo:
        """Return what the engines say of themselves; they are alike."""
        return self.denoises[0].info

    @property
    def num_open(self) -> int:
        """Return how many requests have not ended."""
        return sum(client.num_open for client in self.denoises)

    @property
    def is_gone(self) -> bool:
        """Whether nobody is left who could answer."""
        return all(client.is_gone for client in self.denoises)

    @property
    def on_turn(self) -> TurnCallback | None:
        """Return who is called with every engine's turns."""
        return self._on_turn

    @on_turn.setter
    def on_turn(self, callback: TurnCallback | None) -> None:
        """Pass turns on: all steps, and what the denoise engines hold together."""
        self._on_turn = callback
        if callback is None:
            return
        for client in self.prefills:
            client.on_turn = lambda turn: callback(msgspec.structs.replace(turn, gauges=None))
        for index, client in enumerate(self.denoises):
            client.on_turn = lambda turn, index=index: callback(self._joined(index, turn))

    def _joined(self, index: int, turn: Turn) -> Turn:
        if turn.gauges is None:
            return turn
        self._gauges[index] = turn.gauges
        held = [msgspec.structs.astuple(gauges) for gauges in self._gauges.values()]
        names = Gauges.__struct_fields__
        total = Gauges(
            **{name: sum(values) for name, values in zip(names, zip(*held, strict=True), strict=True)}
        )
        return msgspec.structs.replace(turn, gauges=total)

    async def submit(self, submissions: Sequence[Submit]) -> Outputs:
        """Hand requests to the denoise engine that has fewest. Raises as `EngineClient.submit` does."""
        alive = [client for client in self.denoises if not client.is_gone]
        client = min(alive or self.denoises[:1], key=lambda each: each.num_open)
        return await client.submit(submissions)

    async def ping(self, *, timeout: float) -> None:
        """Wait until every denoise engine that is left has made a turn. Raises TimeoutError, EngineDied."""
        alive = [client for client in self.denoises if not client.is_gone]
        if not alive:
            raise EngineDied(f"the denoise engines of {self.info.name} are gone")
        await asyncio.gather(*(client.ping(timeout=timeout) for client in alive))

    async def stop(self, *, drain: bool) -> None:
        """Let the denoise engines finish (drain) or end now, then the prefill engines."""
        await asyncio.gather(*(client.stop(drain=drain) for client in self.denoises))
        await asyncio.gather(*(client.stop(drain=False) for client in self.prefills))

    async def close(self) -> None:
        """Kill what is still there and give everything back."""
        await asyncio.gather(*(client.close() for client in (*self.denoises, *self.prefills)))


async def _start_all(
    config: EngineConfig,
    peering: PeerConfig,
    count: int,
    started: list[EngineClient],
    on_loading: LoadingCallback | None,
) -> list[EngineClient]:
    """Start engines at the same time; those that came up are in `started`, whatever happens to the others."""
    config = msgspec.structs.replace(config, peering=peering)

    async def start() -> EngineClient:
        client = await EngineClient.start(config, on_loading)
        started.append(client)
        return client

    tasks = [asyncio.create_task(start()) for _ in range(count)]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
