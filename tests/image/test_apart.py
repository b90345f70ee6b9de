"""Encode, denoise and decode in different engines: the pictures are equal, a lost peer costs no answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from msgspec.structs import replace as changed

from sfumato.config import EngineConfig
from sfumato.core.handover import Failed, Layout, StageAsk
from sfumato.core.messages import FinishReason, Submit, Turn
from sfumato.core.plan import RowKind
from sfumato.engine.build_image import LoadedPipeline
from sfumato.engine.image_engine import ImageEngine
from sfumato.engine.image_peers import ImageHandover
from sfumato.engine.peer_config import PeerConfig
from sfumato.engine.pools import start_pools
from sfumato.errors import ConfigError
from sfumato.parallel.handover import CopyCarrier, KVPages
from sfumato.parallel.in_process import InProcessEndpoint, connect
from tests.handover_fakes import HeldLink
from tests.image.drawing import pixels, run, spec_for, start


class Apart:
    """A denoise engine with one that encodes and one that decodes, stepped in turn in this process."""

    def __init__(self, loaded: LoadedPipeline, *, timeout: float = 30.0) -> None:
        self.endpoints: dict[str, InProcessEndpoint] = {}
        self.engines = {role: self._engine(loaded, role, timeout) for role in ("denoise", "encode", "decode")}
        self.denoise = self.engines["denoise"]
        self.links = {
            role: connect(self.endpoints["denoise"], self.endpoints[role], HeldLink)
            for role in ("encode", "decode")
        }
        for _ in range(2):
            for engine in self.engines.values():
                engine.step()

    def _engine(self, loaded: LoadedPipeline, role: str, timeout: float) -> ImageEngine:
        def make(layout: Layout) -> InProcessEndpoint:
            self.endpoints[role] = InProcessEndpoint(layout, CopyCarrier(KVPages(None, 1)))
            return self.endpoints[role]

        peering = PeerConfig(role=role, prefill_seconds=timeout)
        config = changed(loaded.config, peering=peering, deterministic_rows=4)
        return ImageEngine.from_loaded(replace(loaded, config=config), make_endpoint=make)

    @property
    def handover(self) -> ImageHandover:
        """Return the denoise engine's hand-overs."""
        handover = self.denoise.loop.handover
        assert isinstance(handover, ImageHandover)
        return handover

    def run(self, specs: list[Any]) -> list[list[Any]]:
        """Run requests to their ends."""
        found: dict[str, list[Any]] = {self.denoise.add_request(spec): [] for spec in specs}
        while self.denoise.has_work:
            for turn in self.step():
                for output in turn.outputs:
                    found[output.request_id].append(output)
        return list(found.values())

    def step(self) -> list[Any]:
        """Let each engine take a turn; return the denoise engine's."""
        turns = self.denoise.step()
        for role in ("encode", "decode"):
            if self.engines[role].loop.is_alive:
                self.engines[role].step()
        return turns

    def close(self) -> None:
        """End all engines and links."""
        for engine in self.engines.values():
            engine.close()

    def held(self, role: str) -> tuple[HeldLink, HeldLink]:
        """Return both directions of a link: to the peer, and back."""
        there, back = self.links[role]
        assert isinstance(there, HeldLink)
        assert isinstance(back, HeldLink)
        return there, back


MakeApart = Callable[..., Apart]


@pytest.fixture
def make_apart() -> Iterator[MakeApart]:
    """Return what starts three engines; they end with the test."""
    made: list[Apart] = []

    def make(loaded: LoadedPipeline, **options: Any) -> Apart:
        made.append(Apart(loaded, **options))
        return made[-1]

    yield make
    for apart in made:
        apart.close()


def specs_of(loaded: LoadedPipeline) -> list[Any]:
    """Return requests that draw noise in every step, and one with a preview."""
    drawing = "EulerAncestralDiscreteScheduler"
    noisy = {"scheduler": drawing} if drawing in loaded.traits.schedulers else {}
    return [spec_for(loaded, seed=1, **noisy), spec_for(loaded, seed=2, partial_images=1, n=2)]


def test_the_pictures_are_equal(make_apart: MakeApart, any_pipeline: LoadedPipeline) -> None:
    specs = specs_of(any_pipeline)
    expected = [pixels(outputs) for outputs in run(start(any_pipeline, deterministic_rows=4), specs)]
    apart = make_apart(any_pipeline)
    assert [pixels(outputs) for outputs in apart.run(specs)] == expected
    counts = apart.handover.delegating.counts
    # Two encodings, two decodings and a preview.
    assert (counts.asked, counts.arrived, counts.failed, counts.refused) == (5, 5, 0, 0)
    kinds = {step.kind for step in apart.denoise.steps}
    assert kinds == {"denoise"}


@pytest.mark.parametrize("role", ["encode", "decode"])
def test_a_lost_peer_costs_no_answer(make_apart: MakeApart, sd15: LoadedPipeline, role: str) -> None:
    specs = specs_of(sd15)
    expected = [pixels(outputs) for outputs in run(start(sd15, deterministic_rows=4), specs)]
    apart = make_apart(sd15)
    there, _ = apart.held(role)
    there.is_holding = True
    ids = [apart.denoise.add_request(spec) for spec in specs]
    found: dict[str, list[Any]] = {request_id: [] for request_id in ids}

    def turn() -> None:
        for each in apart.step():
            for output in each.outputs:
                found[output.request_id].append(output)

    while not there.held:
        turn()
    there.cut("killed")
    while apart.denoise.has_work:
        turn()
    assert [pixels(outputs) for outputs in found.values()] == expected
    assert apart.handover.delegating.counts.failed >= 1


def test_a_late_answer_is_refused(make_apart: MakeApart, sd15: LoadedPipeline) -> None:
    apart = make_apart(sd15, timeout=0.2)
    _, back = apart.held("decode")
    back.is_holding = True
    outputs = apart.run([spec_for(sd15)])[0]
    assert pixels(outputs) == pixels(run(start(sd15, deterministic_rows=4), [spec_for(sd15)])[0])
    back.release()
    apart.step()
    assert apart.handover.delegating.counts.refused == 1


def test_an_abort_while_a_peer_works(make_apart: MakeApart, sd15: LoadedPipeline) -> None:
    apart = make_apart(sd15)
    _, back = apart.held("encode")
    back.is_holding = True
    request_id = apart.denoise.add_request(spec_for(sd15))
    apart.step()
    apart.denoise.abort(request_id)
    ends = [output.finish_reason for turn in apart.step() for output in turn.outputs]
    assert ends == [FinishReason.ABORT]
    back.release()
    for _ in range(3):
        apart.step()
    assert not apart.denoise.loop.live
    assert not apart.engines["encode"].loop.live


def test_an_outcome_that_is_none_is_refused(make_apart: MakeApart, sd15: LoadedPipeline) -> None:
    apart = make_apart(sd15)
    _, back = apart.held("decode")
    back.is_holding = True
    request_id = apart.denoise.add_request(spec_for(sd15))
    found = []
    while not back.held:
        found += [output for turn in apart.step() for output in turn.outputs]
    (message, _), *_ = back.held
    back.held[0] = (message, b"junk")
    back.release()
    while apart.denoise.has_work:
        found += [output for turn in apart.step() for output in turn.outputs]
    assert found[-1].request_id == request_id
    assert pixels(found) == pixels(run(start(sd15, deterministic_rows=4), [spec_for(sd15)])[0])
    counts = apart.handover.delegating.counts
    assert (counts.refused, counts.failed) == (1, 1)


def test_what_a_helper_cannot_do_is_answered(make_apart: MakeApart, sd15: LoadedPipeline) -> None:
    apart = make_apart(sd15)
    there, back = apart.held("decode")
    back.is_holding = True
    spec = spec_for(sd15)
    asks = {
        "wrong kind": (StageAsk(handover_id="a", kind=RowKind.ENCODE, branch="encode", spec=spec), b""),
        "no latents": (StageAsk(handover_id="b", kind=RowKind.DECODE, branch="final", spec=spec), b"junk"),
        "bad options": (
            StageAsk(
                handover_id="c",
                kind=RowKind.DECODE,
                branch="final",
                spec=spec_for(sd15, scheduler="DDIMScheduler", scheduler_options={"beta_start": -1.0}),
            ),
            b"",
        ),
    }
    for message, payload in asks.values():
        there.send(message, payload)
    apart.engines["decode"].step()
    answers = [message for message, _ in back.held]
    assert [type(answer) for answer in answers] == [Failed] * 3
    assert [answer.handover_id for answer in answers] == ["a", "b", "c"]
    # Asked twice, it is not begun again.
    there.send(*asks["no latents"])
    apart.engines["decode"].step()
    assert len(back.held) == 3
    assert not apart.engines["decode"].loop.live


def test_roles_of_the_other_workload_are_refused(sd15: LoadedPipeline) -> None:
    config = changed(sd15.config, peering=PeerConfig(role="prefill", listen="tcp://127.0.0.1:0", secret="s"))
    with pytest.raises(ConfigError, match="--role prefill is for language models"):
        ImageEngine.from_loaded(replace(sd15, config=config))


def test_three_processes_draw_what_one_draws(sd15: LoadedPipeline) -> None:
    spec = spec_for(sd15, scheduler="EulerAncestralDiscreteScheduler", partial_images=1)
    expected = pixels(run(start(sd15), [spec])[0])

    async def draw() -> tuple[list[Any], int]:
        config = EngineConfig(model=sd15.path, dtype="float32", num_threads=1)
        replicas = await start_pools([config] * 3, ("encode", "decode"))
        arrived = 0

        def count(turn: Turn) -> None:
            nonlocal arrived
            if turn.gauges is not None:
                arrived = max(arrived, turn.gauges.arrived)

        replicas.on_turn = count
        try:
            outputs = await replicas.submit([Submit(request_id="one", spec=spec)])
            found = [output async for output in outputs]
        finally:
            await replicas.stop(drain=True)
            await replicas.close()
        return found, arrived

    found, arrived = asyncio.run(draw())
    # A request that comes before the encoding engine has introduced itself is encoded at home.
    assert arrived >= 2
    close = [abs(a - b) <= 1 for a, b in zip(pixels(found)[0], expected[0], strict=True)]
    assert sum(close) >= 0.999 * len(close)
