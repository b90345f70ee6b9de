"""The deployments that own engines: those that answer requests, and those that work for them."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from ray import serve

from sfumato.config import EngineConfig
from sfumato.deploy.config import Recovery
from sfumato.deploy.roll import FRONT, Member, attend
from sfumato.deploy.ticket import Front, Ticket
from sfumato.deploy.worker import Worker
from sfumato.engine.client import EngineClient


class EngineReplica:
    """One engine and its links to fronts; the engine process ends with this actor, however that ends."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: bytes, model: str, recovery: bytes, roll: Any, helpers: tuple[str, ...]
    ) -> None:
        settings = msgspec.json.decode(recovery, type=Recovery)
        engine_config = msgspec.json.decode(config, type=EngineConfig)
        if helpers:
            raise NotImplementedError
        self._engine = await EngineClient.start(engine_config)
        self._worker = Worker(
            self._engine,
            serve.get_replica_context().replica_id.unique_id,
            model,
            silence_seconds=settings.silence,
            stall_seconds=settings.stall,
        )
        self._attending = asyncio.create_task(attend(roll, None, self._meet))

    def _meet(self, members: list[Member]) -> None:
        self._worker.meet([Front(each.address, each.key) for each in members if each.kind == FRONT])

    async def describe(self) -> bytes:
        """Return what the engine says of itself."""
        return msgspec.msgpack.encode(self._engine.info)

    async def run(self, ticket: Ticket) -> None:
        """Run a request to its end; it is claimed, and answered, past Ray."""
        await self._worker.run(ticket)

    async def check_health(self) -> None:
        """Raise EngineDied if the engine is gone: Ray then replaces this replica."""
        self._worker.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what the autoscaler weighs."""
        gauges = self._worker.gauges
        return {
            "waiting": float(gauges.waiting),
            "running": float(gauges.running),
            "step_seconds": self._worker.step_seconds,
        }

    async def __del__(self) -> None:
        self._attending.cancel()
        await self._worker.close()
