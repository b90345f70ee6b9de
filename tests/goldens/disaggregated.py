"""Replays through a prefill and a denoise engine: in one process, or with a second one over a transport."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from sfumato.config import EngineConfig
from sfumato.core.handover import Layout
from sfumato.core.messages import Turn
from sfumato.core.plan import RowKind
from sfumato.core.request import Request
from sfumato.engine.build import Loaded
from sfumato.engine.client import EngineClient
from sfumato.engine.engine import Engine
from sfumato.engine.peer_config import PeerConfig
from sfumato.engine.peers import PeerHandover
from sfumato.errors import ConfigError
from sfumato.parallel.handover import CopyCarrier, KVPages
from sfumato.parallel.in_process import InProcessEndpoint, connect

Start = Callable[[Loaded], Engine]

TRANSPORTS = ("in-process", "sockets", "nixl")
_SECRET = "goldens"


class Refused(Exception):
    """A mode cannot run a model, and says why."""


@contextmanager
def starting(transport: str | None) -> Iterator[tuple[Start, Callable[[], list[str]]]]:
    """Yield what starts the engine of a replay, and what there is to say of all of them at the end."""
    if transport is None:
        yield Engine.from_loaded, list
    elif transport == "in-process":
        counts = Counts()
        yield lambda loaded: start_both(loaded, counts), counts.lines
    else:
        processes = TwoProcesses(transport)
        try:
            yield processes.start, processes.counts.lines
        finally:
            processes.close()


@dataclass
class Counts:
    """What was handed over in all replays."""

    arrived: int = 0
    tokens: int = 0

    def lines(self) -> list[str]:
        """Return a line for a person."""
        return [f"{self.arrived} hand-overs of {self.tokens} tokens"]


class DisaggregatedEngine(Engine):
    """A denoise engine; another one in this process may take a turn after each of its own.

    A whole block that is prefilled here, or a hand-over that fails, is an error: nothing would be shown.
    """

    prefill: Engine | None = None
    counts: Counts

    def step(self) -> list[Turn]:
        """Take a turn, then let the prefill engine take one."""
        turns = super().step()
        if self.prefill is not None:
            self.prefill.step()
            self.prefill.loop.scheduler.check()
        return turns

    @property
    def peers(self) -> PeerHandover:
        """Return its hand-overs."""
        peers = self.loop.handover
        assert isinstance(peers, PeerHandover)
        return peers

    def watch(self) -> None:
        """Check every plan."""
        scheduler = self.loop.scheduler
        plan = scheduler.plan

        def checked(live: dict[str, Request], kinds: frozenset[RowKind]):  # type: ignore[no-untyped-def]
            made = plan(live, kinds)
            for row in made.rows:
                size = live[row.request_id].standing.block_length
                is_whole = row.end - row.start >= size
                assert row.kind is not RowKind.PREFILL or not is_whole, f"prefilled here: {row}"
            return made

        scheduler.plan = checked  # type: ignore[method-assign,assignment]

    def close(self) -> None:
        """Count what was handed over and end both engines."""
        counts = self.peers.fetching.counts
        self.counts.arrived += counts.arrived
        self.counts.tokens += counts.tokens
        super().close()
        if self.prefill is not None:
            self.prefill.close()
        assert counts.failed == 0
        assert counts.asked == counts.arrived


def _with(loaded: Loaded, peering: PeerConfig) -> Loaded:
    return dataclasses.replace(loaded, config=msgspec.structs.replace(loaded.config, peering=peering))


def start_both(loaded: Loaded, counts: Counts) -> Engine:
    """Start both engines in this process. Raises Refused."""
    endpoints: list[InProcessEndpoint] = []

    def make(layout: Layout, pages: KVPages) -> InProcessEndpoint:
        endpoints.append(InProcessEndpoint(layout, CopyCarrier(pages)))
        return endpoints[-1]

    try:
        prefill = Engine.from_loaded(_with(loaded, PeerConfig(role="prefill")), make_endpoint=make)
    except ConfigError as error:
        raise Refused(str(error)) from error
    engine = DisaggregatedEngine.from_loaded(_with(loaded, PeerConfig(role="denoise")), make_endpoint=make)
    assert isinstance(engine, DisaggregatedEngine)
    connect(endpoints[1], endpoints[0])
    return _ready(engine, prefill, counts)


def _ready(engine: DisaggregatedEngine, prefill: Engine | None, counts: Counts) -> Engine:
    engine.prefill, engine.counts = prefill, counts
    engine.watch()
    # The link's beginning is taken in before anything is asked.
    engine.step()
    return engine


@dataclass
class TwoProcesses:
    """A prefill process for each checkpoint that is replayed, all ended at the end."""

    transport: str
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self._runner = asyncio.Runner()
        self._clients: dict[bytes, EngineClient] = {}

    def start(self, loaded: Loaded) -> Engine:
        """Start a denoise engine here that asks a process. Raises Refused."""
        try:
            client = self._client(loaded.config)
        except ConfigError as error:
            raise Refused(str(error)) from error
        peering = PeerConfig(
            role="denoise", peers=(client.info.peer_address or "",), secret=_SECRET, transport=self.transport
        )
        engine = DisaggregatedEngine.from_loaded(_with(loaded, peering))
        assert isinstance(engine, DisaggregatedEngine)
        return _ready(engine, None, self.counts)

    def _client(self, config: EngineConfig) -> EngineClient:
        key = msgspec.json.encode(config)
        if key not in self._clients:
            peering = PeerConfig(
                role="prefill", listen="tcp://127.0.0.1:0", secret=_SECRET, transport=self.transport
            )
            config = msgspec.structs.replace(config, peering=peering, num_threads=1)
            self._clients[key] = self._runner.run(EngineClient.start(config))
        return self._clients[key]

    def close(self) -> None:
        """End every process."""
        for client in self._clients.values():
            self._runner.run(client.close())
        self._runner.close()
