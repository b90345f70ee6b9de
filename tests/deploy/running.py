"""A front and replicas with real engines and sockets in one process, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from sfumato.config import EngineConfig
from sfumato.core.messages import Output, Submit
from sfumato.deploy.desk import Desk
from sfumato.deploy.remote import RemoteEngines
from sfumato.deploy.running import Patience
from sfumato.deploy.ticket import Ticket
from sfumato.deploy.worker import Worker
from sfumato.engine.client import EngineClient
from sfumato.engine.frontend import SamplingParams, make_spec
from sfumato.engine.limits import Limits

MODEL = "sfumato-tiny-sdar"
SILENCE = 0.5
CONFIG = EngineConfig(
    model=MODEL,
    dtype="float32",
    device="cpu",
    kv_memory=8 << 20,
    num_threads=1,
    limits=Limits(max_running_requests=8),
)
# One token per step.
SLOW = SamplingParams(
    max_tokens=64,
    ignore_eos=True,
    seed=0,
    algorithm="low_confidence",
    algorithm_parameters={"threshold": 2.0},
)


class Died(Exception):
    """What Ray would raise for a call to an actor that is gone."""


class Mute:
    """A socket that hears and says nothing."""

    def __init__(self, socket: Any) -> None:
        self.recv = socket.recv
        self.close = socket.close

    def send(self, frame: bytes, flag: int) -> None:
        pass


class LocalCall:
    """A call to a worker in the same process."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    def __await__(self):  # type: ignore[no-untyped-def]
        return asyncio.shield(self._task).__await__()

    def cancel(self) -> None:
        self._task.cancel()


@dataclass
class Cluster:
    """A front and its workers; calls go to the first that is not to be avoided, in turn."""

    desk: Desk
    front: RemoteEngines
    workers: dict[str, Worker]
    tickets: list[Ticket] = field(default_factory=list)
    deaf: set[str] = field(default_factory=set)
    calls: dict[str, list[asyncio.Task[None]]] = field(default_factory=dict)

    def dispatch(self, ticket: Ticket) -> LocalCall:
        """Send a ticket as Ray would, by name, in turn; a deaf worker never gets it."""
        self.tickets.append(ticket)
        able = [name for name in self.workers if name not in ticket.hints.avoid] or list(self.workers)
        name = able[len(self.tickets) % len(able)]
        is_deaf = name in self.deaf
        task = asyncio.create_task(asyncio.sleep(3600) if is_deaf else self.workers[name].run(ticket))
        self.calls.setdefault(name, []).append(task)
        return LocalCall(task)

    async def kill(self, name: str) -> None:
        """Let a replica go as its node goes: engine, links and calls at once."""
        worker = self.workers.pop(name)
        for call in self.calls.get(name, []):
            call.cancel()
        await worker.close()


@asynccontextmanager
async def cluster(
    num_workers: int, *, stall_seconds: float = 30.0, **patience: float
) -> AsyncIterator[Cluster]:
    """Run a front and workers; leave no process behind."""
    engines = await asyncio.gather(*(EngineClient.start(CONFIG) for _ in range(num_workers)))
    desk = Desk("127.0.0.1", silence_seconds=SILENCE)
    workers = {
        f"w{number}": Worker(
            engine, f"w{number}", MODEL, silence_seconds=SILENCE, stall_seconds=stall_seconds
        )
        for number, engine in enumerate(engines)
    }
    made: list[Cluster] = []
    known = {"claim_seconds": 1.0, "wait_seconds": 5.0, **patience}
    front = RemoteEngines(
        engines[0].info,
        MODEL,
        desk,
        lambda ticket: made[0].dispatch(ticket),
        Patience(**known),  # type: ignore[arg-type]
    )
    made.append(Cluster(desk, front, workers))
    try:
        for worker in workers.values():
            worker.meet([desk.front])
        while len(front.clients) < num_workers:
            await asyncio.sleep(0.01)
        yield made[0]
    finally:
        await front.close()
        await asyncio.gather(*(worker.close() for worker in made[0].workers.values()))
        await desk.close()


def submission(front: RemoteEngines, name: str, params: SamplingParams = SLOW, **options: float) -> Submit:
    """Return a request whose answer depends on its name alone."""
    prompt = [5 + (ord(letter) * 7 + place) % 190 for place, letter in enumerate(name * 3)]
    return Submit(request_id=name, spec=make_spec(prompt, params, front.info.traits), **options)  # type: ignore[arg-type]


async def collect(front: RemoteEngines, submissions: Sequence[Submit]) -> dict[str, list[Output]]:
    """Submit together and return all outputs."""
    found: dict[str, list[Output]] = {each.request_id: [] for each in submissions}
    async for output in await front.submit(submissions):
        found[output.request_id].append(output)
    return found


def tokens(outputs: Sequence[Output]) -> list[int]:
    """Return the tokens that a client has got."""
    return [token for output in outputs for token in output.token_ids]
