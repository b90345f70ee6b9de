"""Two engines with a real model in one thread: every kind of request equals its answer of one engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from sfumato.config import EngineConfig
from sfumato.core.handover import Layout
from sfumato.core.messages import Turn
from sfumato.engine.build import Loaded, load
from sfumato.engine.engine import Engine
from sfumato.engine.frontend import SamplingParams
from sfumato.engine.peer_config import PeerConfig
from sfumato.engine.peers import PeerHandover
from sfumato.parallel.handover import CopyCarrier, KVPages
from sfumato.parallel.in_process import InProcessEndpoint, connect

PROMPT = [3 + place * 7 % 200 for place in range(70)]


class PairedEngine(Engine):
    """Lets a prefill engine take a turn after each of its own."""

    prefill: Engine

    def step(self) -> list[Turn]:
        """Take both turns."""
        turns = super().step()
        self.prefill.step()
        for engine in (self, self.prefill):
            engine.loop.scheduler.check()
        return turns

    @property
    def num_arrived(self) -> int:
        """Return how many prompts have come from the prefill engine."""
        peers = self.loop.handover
        assert isinstance(peers, PeerHandover)
        assert peers.fetching.counts.failed == 0
        return peers.fetching.counts.arrived


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(EngineConfig(model="sfumato-tiny-sdar", dtype="float32", num_threads=1, kv_memory=16 << 20))


@pytest.fixture
def local(loaded: Loaded) -> Engine:
    return Engine.from_loaded(loaded)


@pytest.fixture(params=["off", "on", "device"])
def pair(loaded: Loaded, request: pytest.FixtureRequest) -> Iterator[PairedEngine]:
    endpoints: list[InProcessEndpoint] = []

    def make(layout: Layout, pages: KVPages) -> InProcessEndpoint:
        endpoints.append(InProcessEndpoint(layout, CopyCarrier(pages)))
        return endpoints[-1]

    def start(kind: type[Engine], role: str) -> Any:
        config = msgspec.structs.replace(loaded.config, peering=PeerConfig(role=role), overlap=request.param)
        return kind.from_loaded(dataclasses.replace(loaded, config=config), make_endpoint=make)

    prefill, engine = start(Engine, "prefill"), start(PairedEngine, "denoise")
    engine.prefill = prefill
    connect(endpoints[1], endpoints[0])
    engine.step()
    yield engine
    engine.close()
    prefill.close()


def infill() -> tuple[int | None, ...]:
    """Return 80 positions: open ones, two whole blocks and more that are given, open ones again."""
    given = [5 + place % 90 for place in range(44)]
    return (*[None] * 10, *given, *[None] * 26)


PARAMS = [
    SamplingParams(seed=1, max_tokens=40, ignore_eos=True),
    SamplingParams(seed=2, max_tokens=40, ignore_eos=True, temperature=1.0, top_k=20, n=2),
    SamplingParams(seed=3, max_tokens=40, ignore_eos=True, block_length=32),
    SamplingParams(seed=4, max_tokens=24, ignore_eos=True, logprobs=2, temperature=0.7),
    SamplingParams(seed=5, max_tokens=80, ignore_eos=True, infill=infill()),
    SamplingParams(seed=6, max_tokens=24, algorithm="sdar", ignore_eos=True),
]


@pytest.mark.parametrize("params", PARAMS, ids=lambda params: f"seed{params.seed}")
def test_every_kind_of_request_equals_one_engine(
    pair: PairedEngine, local: Engine, params: SamplingParams
) -> None:
    found, expected = pair.generate(PROMPT, params), local.generate(PROMPT, params)
    assert [choice.token_ids for choice in found] == [choice.token_ids for choice in expected]
    assert [choice.logprobs for choice in found] == [choice.logprobs for choice in expected]
    assert [choice.usage.denoise_steps for choice in found] == [
        choice.usage.denoise_steps for choice in expected
    ]
    assert pair.num_arrived >= 1


def test_blocks_that_are_given_behind_open_ones_are_asked_for_too(pair: PairedEngine) -> None:
    pair.generate(PROMPT, PARAMS[4])
    # The prompt's blocks, and later the two given blocks with the one that was denoised in front of them. One
    # step ahead, those are fed here: their launch begins before this loop knows that they are next.
    depth = pair.loop.lanes[0].depth
    assert pair.num_arrived == (1 if depth else 2)


def test_scores_equal_one_engine(pair: PairedEngine, local: Engine) -> None:
    found = pair.log_likelihood(PROMPT, PROMPT[:20], logprobs=1)
    expected = local.log_likelihood(PROMPT, PROMPT[:20], logprobs=1)
    assert found == expected
    assert pair.num_arrived == 1


def test_many_requests_at_once_equal_one_engine(pair: PairedEngine, local: Engine) -> None:
    prompts = [PROMPT[: 1 + index * 5 % 70] for index in range(16)]
    params = [msgspec.structs.replace(PARAMS[index % 2], seed=index, n=1) for index in range(16)]
    found, expected = pair.generate(prompts, params), local.generate(prompts, params)
    assert [choice.token_ids for choice in found] == [choice.token_ids for choice in expected]
    assert pair.num_arrived >= 3


def test_a_prompt_that_is_known_already_needs_nobody(pair: PairedEngine) -> None:
    pair.generate(PROMPT[:64], PARAMS[0])
    before = pair.num_arrived
    (choice,) = pair.generate(PROMPT[:64], PARAMS[0])
    assert pair.num_arrived == before
    assert choice.usage.cached_tokens == 64
