"""Prefill and denoise engines over the table-driven model, in one thread; transports that misbehave."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from sfumato.core.handover import Layout, PeerMessage
from sfumato.engine.limits import Limits
from sfumato.engine.peering import Peering
from sfumato.engine.peers import PeerHandover
from sfumato.parallel.handover import CopyCarrier, KVPages
from sfumato.parallel.in_process import InProcessEndpoint, InProcessLink, connect
from tests.fakes import BLOCK, Harness

TIMEOUT = 10.0
LAYOUT = Layout(
    model="fake",
    fingerprint="0",
    dtype="float32",
    page_size=BLOCK,
    block_length=BLOCK,
    kv_shapes=((1, 4),),
)


class HeldLink(InProcessLink):
    """Keeps messages until a test lets them go."""

    is_holding = False

    def deliver(self, message: PeerMessage, payload: bytes | bytearray | None) -> None:
        """Keep a message, or pass it on."""
        if not self.is_holding:
            super().deliver(message, payload)
            return
        self.__dict__.setdefault("held", []).append((message, payload))

    @property
    def held(self) -> list[tuple[PeerMessage, bytes | bytearray | None]]:
        """Return what is kept."""
        return cast(
            list[tuple[PeerMessage, "bytes | bytearray | None"]], self.__dict__.setdefault("held", [])
        )

    def release(self) -> None:
        """Pass on what was kept, in order."""
        self.is_holding = False
        held, self.__dict__["held"] = self.held, []
        for message, payload in held:
            self.deliver(message, payload)


class UnreliableLink(InProcessLink):
    """Delays, drops and doubles messages at random; order is kept unless a delay changes it."""

    rng = random.Random(0)
    drop = double = 0.0
    max_delay = 0

    def deliver(self, message: PeerMessage, payload: bytes | bytearray | None) -> None:
        """Lose, double or keep a message for some turns."""
        if self.rng.random() < self.drop:
            return
        for _ in range(2 if self.rng.random() < self.double else 1):
            self.waiting.append((self.rng.randint(0, self.max_delay), message, payload))

    @property
    def waiting(self) -> list[tuple[int, PeerMessage, bytes | bytearray | None]]:
        """Return what is on its way."""
        return cast(
            list[tuple[int, PeerMessage, "bytes | bytearray | None"]],
            self.__dict__.setdefault("on_its_way", []),
        )

    def turn(self) -> None:
        """Let a turn's time pass."""
        waiting = list(self.waiting)
        self.waiting.clear()
        for turns, message, payload in waiting:
            if turns <= 0:
                super().deliver(message, payload)
            else:
                self.waiting.append((turns - 1, message, payload))


class PeeredHarness(Harness):
    """A harness whose loop has peers; pages that drain count as held."""

    @property
    def peers(self) -> PeerHandover:
        """Return both sides of its hand-overs."""
        return cast(PeerHandover, self.loop.handover)

    def num_draining(self) -> int:
        """Return pages that no request holds and a peer may still write to."""
        return self.peers.fetching.num_draining_pages


@dataclass
class Pools:
    """One denoise engine and some prefill engines; `step` lets each of them take a turn."""

    num_prefill: int = 1
    limits: Limits = field(default_factory=Limits)
    prefill_limits: Limits = field(default_factory=Limits)
    num_pages: int = 256
    num_prefill_pages: int = 256
    link: type[InProcessLink] = InProcessLink
    depth: int = 0

    def __post_init__(self) -> None:
        self.denoise = self._engine("denoise", self.limits, self.num_pages)
        self.prefills = [
            self._engine("prefill", self.prefill_limits, self.num_prefill_pages)
            for _ in range(self.num_prefill)
        ]
        self.links: list[tuple[InProcessLink, InProcessLink]] = [
            connect(self._endpoint(self.denoise), self._endpoint(prefill), self.link)
            for prefill in self.prefills
        ]
        # The links' beginnings are known before anything is submitted.
        self.step()

    def _engine(self, role: str, limits: Limits, num_pages: int) -> PeeredHarness:
        copy = KVPages(None, BLOCK)
        peering = Peering(
            role=role,
            endpoint=InProcessEndpoint(LAYOUT, CopyCarrier(copy)),
            copy=copy,
            page_size=BLOCK,
            num_pages=num_pages,
            prefill_seconds=TIMEOUT,
        )
        return PeeredHarness(limits=limits, num_pages=num_pages, peering=peering, depth=self.depth)

    def _endpoint(self, engine: PeeredHarness) -> InProcessEndpoint:
        return cast(InProcessEndpoint, engine.peers.endpoint)

    @property
    def prefill(self) -> PeeredHarness:
        """Return the first prefill engine."""
        return self.prefills[0]

    def step(self) -> None:
        """One turn of every engine, the laws checked after each."""
        self.denoise.step()
        for prefill in self.prefills:
            prefill.step()
        for pair in self.links:
            for link in pair:
                if isinstance(link, UnreliableLink):
                    link.turn()

    def run(self, max_steps: int = 2000, *, seconds: float = 0.0) -> None:
        """Step until nothing is live anywhere; seconds: that each step takes on all clocks."""
        for _ in range(max_steps):
            self.step()
            self.pass_time(seconds)
            is_busy = any(engine.loop.live for engine in (self.denoise, *self.prefills))
            if not is_busy and not self.denoise.num_draining():
                return
        raise AssertionError("still live")

    def run_until(self, is_so: Callable[[], bool], max_steps: int = 200) -> None:
        """Step until something is so."""
        for _ in range(max_steps):
            if is_so():
                return
            self.step()
        raise AssertionError("it never came to that")

    def pass_time(self, seconds: float) -> None:
        """Move all clocks."""
        for engine in (self.denoise, *self.prefills):
            engine.clock.advance(seconds)

    def check_nothing_is_left(self) -> None:
        """No page leased, no request live, nothing unacknowledged, on either side."""
        for engine in (self.denoise, *self.prefills):
            pool = engine.loop.scheduler._pages.pool
            assert pool.num_leased == 0
            assert not engine.loop.live
            assert not engine.peers.fetching._fetches
            assert not engine.peers.fetching._drains
            assert not engine.peers.fetching.roster.num_failed
            assert not engine.peers.filling._fills

    def close(self) -> None:
        """End all links."""
        for engine in (self.denoise, *self.prefills):
            engine.loop.handover.close()
