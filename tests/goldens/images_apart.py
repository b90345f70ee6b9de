"""Image cases through three engines of this process: one encodes, one denoises, one decodes."""

from __future__ import annotations

import dataclasses
import time

from msgspec.structs import replace as changed

from sfumato.core.handover import Layout
from sfumato.core.messages import Turn
from sfumato.engine.build_image import LoadedPipeline
from sfumato.engine.image_engine import ImageEngine
from sfumato.engine.image_peers import ImageHandover
from sfumato.engine.peer_config import PeerConfig
from sfumato.parallel.handover import CopyCarrier, KVPages
from sfumato.parallel.in_process import InProcessEndpoint, connect

_HELPERS = ("encode", "decode")
_SECRET = "goldens"
_WAIT_SECONDS = 10.0


class ApartEngine(ImageEngine):
    """A denoise engine; those that help take a turn after each of its own.

    A stage that is run here, or one that fails there, is an error: nothing would be shown.
    """

    helpers: tuple[ImageEngine, ...] = ()

    def step(self) -> list[Turn]:
        """Take a turn, then let the others take theirs."""
        turns = super().step()
        for helper in self.helpers:
            helper.step()
        assert all(step.kind == "denoise" for turn in turns for step in turn.steps)
        return turns

    @property
    def handover(self) -> ImageHandover:
        """Return its hand-overs."""
        handover = self.loop.handover
        assert isinstance(handover, ImageHandover)
        return handover

    def meet(self) -> ApartEngine:
        """Wait until both helpers have said what they run."""
        end = time.monotonic() + _WAIT_SECONDS
        while self.handover.delegating.roster.num_able < len(self.helpers):
            assert time.monotonic() < end, "an engine has not introduced itself"
            self.step()
        return self

    def close(self) -> None:
        """End all of them; every stage that was asked for has come."""
        counts = self.handover.delegating.counts
        super().close()
        for helper in self.helpers:
            helper.close()
        assert counts.asked == counts.arrived, counts
        assert counts.asked >= len(self.helpers), counts


def start_apart(loaded: LoadedPipeline, transport: str) -> ApartEngine:
    """Start three engines, linked in memory or over TCP."""
    if transport == "in-process":
        return _in_process(loaded)
    listening = PeerConfig(listen="tcp://127.0.0.1:0", secret=_SECRET)
    helpers = tuple(
        ImageEngine.from_loaded(_with(loaded, changed(listening, role=role))) for role in _HELPERS
    )
    peers = tuple(str(helper.loop.handover.address) for helper in helpers)
    denoising = PeerConfig(role="denoise", peers=peers, secret=_SECRET)
    engine = ApartEngine.from_loaded(_with(loaded, denoising))
    assert isinstance(engine, ApartEngine)
    engine.helpers = helpers
    return engine.meet()


def _in_process(loaded: LoadedPipeline) -> ApartEngine:
    endpoints: list[InProcessEndpoint] = []

    def make(layout: Layout) -> InProcessEndpoint:
        endpoints.append(InProcessEndpoint(layout, CopyCarrier(KVPages(None, 1))))
        return endpoints[-1]

    helpers = tuple(
        ImageEngine.from_loaded(_with(loaded, PeerConfig(role=role)), make_endpoint=make) for role in _HELPERS
    )
    engine = ApartEngine.from_loaded(_with(loaded, PeerConfig(role="denoise")), make_endpoint=make)
    assert isinstance(engine, ApartEngine)
    engine.helpers = helpers
    for helper in endpoints[:-1]:
        connect(endpoints[-1], helper)
    return engine.meet()


def _with(loaded: LoadedPipeline, peering: PeerConfig) -> LoadedPipeline:
    return dataclasses.replace(loaded, config=changed(loaded.config, peering=peering))
