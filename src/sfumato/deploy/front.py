"""The ingress deployment: the same HTTP application as on one machine, over replicas anywhere."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import msgspec
from ray import serve
from ray.util import get_node_ip_address

from sfumato.deploy.config import FrontSettings, Recovery
from sfumato.deploy.desk import Desk
from sfumato.deploy.links import Links
from sfumato.deploy.logs import join_logs
from sfumato.deploy.pages import joined
from sfumato.deploy.remote import RemoteEngines
from sfumato.deploy.roll import FRONT, Member, attend
from sfumato.deploy.running import Patience
from sfumato.deploy.ticket import Front as Address
from sfumato.engine.wire import EngineInfo
from sfumato.serve.app import create_app
from sfumato.serve.metrics import page_of
from sfumato.serve.registry import Registry, ServedModel
from sfumato.serve.settings import ServerSettings
from sfumato.serve.settings_file import parse_bytes

# A front that does not answer within this is missing on the page.
_PAGE_SECONDS = 1.0


@serve.ingress()
class Front:
    """One process that answers HTTP.

    engines: by the name that clients use, the model's name in the cluster and a handle of its replicas.
    """

    def __init__(
        self, settings: bytes, recovery: bytes, roll: Any, engines: dict[str, tuple[str, Any, list[Any]]]
    ) -> None:
        join_logs()
        self._settings = msgspec.json.decode(settings, type=FrontSettings)
        self._recovery = msgspec.json.decode(recovery, type=Recovery)
        self._roll = roll
        self._engines = engines
        self._others: dict[str, Address] = {}
        self._links: Links | None = None
        self._desk: Desk | None = None
        self._models: list[ServedModel] = []

    async def __serve_build_asgi_app__(self) -> Any:
        """Return the application, once every model has a replica that is loaded."""
        recovery = self._recovery
        self._desk = Desk(get_node_ip_address(), silence_seconds=recovery.silence)
        name = serve.get_replica_context().replica_id.unique_id
        front = self._desk.front
        member = Member(FRONT, name, front.address, front.key)
        self._attending = asyncio.create_task(attend(self._roll, member, partial(self._note_fronts, name)))
        patience = Patience(claim_seconds=recovery.silence, wait_seconds=recovery.wait)
        for served, (model, handle, _) in self._engines.items():
            info = msgspec.msgpack.decode(await handle.describe.remote(), type=EngineInfo)
            client = RemoteEngines(info, model, self._desk, handle.run.remote, patience)
            self._models.append(ServedModel(served or info.name, client))
        settings = ServerSettings(
            api_keys=self._settings.api_keys,
            health_timeout=self._settings.health_timeout,
            max_body_bytes=parse_bytes(self._settings.max_body_bytes, "front.max-body-bytes"),
        )
        app = create_app(Registry(self._models), settings)
        if self._settings.replicas > 1:
            self._desk.page = partial(page_of, app.state.metrics, app.state.registry)
            self._links = Links.of_front(name, silence_seconds=recovery.silence)
            app.state.join_pages = partial(self._join_pages, name, self._links)
        return app

    def _note_fronts(self, own_name: str, members: list[Member]) -> None:
        others = [each for each in members if each.kind == FRONT and each.name != own_name]
        self._others = {each.name: Address(each.address, each.key) for each in others}

    async def _join_pages(self, name: str, links: Links, page: str) -> str:
        """Return the page of all fronts that answer in time."""
        return joined({name: page, **await links.pages(self._others, timeout=_PAGE_SECONDS)})

    async def __del__(self) -> None:
        if self._desk is None:
            return
        self._attending.cancel()
        for model in self._models:
            await model.close()
        if self._links is not None:
            await self._links.close()
        await self._desk.close()
