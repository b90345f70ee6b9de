"""The deployments that own engines: those that answer requests, and those that work for them.

An engine process ends with the actor that owns it, however that ends.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import msgspec
from msgspec.structs import replace
from ray import serve
from ray.util import get_node_ip_address

from sfumato.config import EngineConfig
from sfumato.deploy.config import Recovery
from sfumato.deploy.logs import join_logs
from sfumato.deploy.roll import FRONT, Member, attend, helper_kind
from sfumato.deploy.ticket import Front, Ticket
from sfumato.deploy.worker import Worker
from sfumato.engine.client import EngineClient
from sfumato.errors import EngineDied

_STOP_SECONDS = 10.0


class EngineReplica:
    """One engine that answers requests, its links to fronts, and who works for it.

    model: its name in the cluster. helpers: the roles of engines that work for it.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: bytes, model: str, recovery: bytes, roll: Any, helpers: tuple[str, ...]
    ) -> None:
        join_logs()
        self._worker: Worker | None = None
        settings = msgspec.json.decode(recovery, type=Recovery)
        self._kinds = {helper_kind(role, model) for role in helpers}
        self._peers: tuple[tuple[str, str], ...] = ()
        self._engine = await EngineClient.start(msgspec.json.decode(config, type=EngineConfig))
        self._worker = Worker(
            self._engine,
            serve.get_replica_context().replica_id.unique_id,
            model,
            silence_seconds=settings.silence,
            stall_seconds=settings.stall,
        )
        self._attending = asyncio.create_task(attend(roll, None, self._meet))

    def _meet(self, members: list[Member]) -> None:
        assert self._worker is not None
        self._worker.meet([Front(each.address, each.key) for each in members if each.kind == FRONT])
        peers = tuple(
            sorted((each.address, each.key.decode()) for each in members if each.kind in self._kinds)
        )
        if peers != self._peers and not self._engine.is_gone:
            self._peers = peers
            self._engine.meet(peers)

    async def describe(self) -> bytes:
        """Return what the engine says of itself."""
        return msgspec.msgpack.encode(self._engine.info)

    async def run(self, ticket: Ticket) -> None:
        """Run a request to its end; it is claimed, and answered, past Ray."""
        assert self._worker is not None
        await self._worker.run(ticket)

    async def check_health(self) -> None:
        """Raise EngineDied if the engine is gone: Ray then replaces this replica."""
        assert self._worker is not None
        self._worker.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what the autoscaler weighs."""
        assert self._worker is not None
        gauges = self._worker.gauges
        return {
            "waiting": float(gauges.waiting),
            "running": float(gauges.running),
            "step_seconds": self._worker.step_seconds,
        }

    async def __del__(self) -> None:
        # One that could not start has none.
        if self._worker is not None:
            self._attending.cancel()
            await self._worker.close()


class HelperReplica:
    """One engine that prefills, encodes or decodes for those that denoise, who find it on the roll."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: bytes, model: str, recovery: bytes, roll: Any
    ) -> None:
        join_logs()
        self._engine: EngineClient | None = None
        self._settings = msgspec.json.decode(recovery, type=Recovery)
        engine_config = msgspec.json.decode(config, type=EngineConfig)
        # Known to those who are on the roll alone.
        secret = secrets.token_hex(32)
        listen = f"tcp://{get_node_ip_address()}:0"
        peering = replace(engine_config.peering, listen=listen, secret=secret)
        self._engine = await EngineClient.start(replace(engine_config, peering=peering))
        name = serve.get_replica_context().replica_id.unique_id
        address = self._engine.info.peer_address
        assert address is not None
        member = Member(helper_kind(engine_config.peering.role, model), name, address, secret.encode())
        self._attending = asyncio.create_task(attend(roll, member, lambda _: None))

    async def check_health(self) -> None:
        """Raise EngineDied if the engine is gone, or stands still: Ray then replaces this replica."""
        assert self._engine is not None
        try:
            await self._engine.ping(timeout=self._settings.stall)
        except TimeoutError as error:
            raise EngineDied("the engine makes no turn") from error

    async def __del__(self) -> None:
        if self._engine is None:
            return
        self._attending.cancel()
        # It finishes what it was asked for; who asked goes on without it otherwise.
        await asyncio.wait({asyncio.create_task(self._engine.stop(drain=True))}, timeout=_STOP_SECONDS)
        await self._engine.close()
