"""Situations 20, 22 and 34 again, where several ranks hold the model together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch

from sfumato.config import EngineConfig
from sfumato.core.messages import FinishReason, Output
from sfumato.engine.engine import Engine
from sfumato.engine.frontend import SamplingParams
from sfumato.engine.limits import Limits
from tests.engine.test_shared_weights import run, running
from tests.models.checkpoints import SDAR_MOE, random_weights, write

# Whoever has this token in its prompt gets states that are no numbers.
BAD = 7
PARAMS = SamplingParams(seed=1, max_tokens=16, ignore_eos=True)
SLOW = SamplingParams(
    seed=2,
    max_tokens=48,
    ignore_eos=True,
    algorithm="low_confidence",
    algorithm_parameters={"threshold": 2.0},
)
LIMITS = Limits(max_running_requests=3)
PROMPTS = {"first": [11, 12, 13, 14, 15], "second": [21, 22], "third": [31, 32, 33, 34, 35, 36, 37, 38, 39]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model with experts and one token that breaks a forward."""
    weights = random_weights(SDAR_MOE)
    weights["model.embed_tokens.weight"][BAD] = torch.nan
    return str(write(tmp_path_factory.mktemp("ranks") / "model", SDAR_MOE, weights))


@pytest.fixture(scope="module")
def solo(checkpoint: str) -> dict[str, list[int]]:
    """What each prompt gets alone, on one rank."""
    engine = Engine.load(checkpoint, dtype="float32")
    return {name: engine.generate(prompt, PARAMS)[0].token_ids for name, prompt in PROMPTS.items()}


@pytest.fixture(scope="module")
def engine(checkpoint: str) -> Iterator[Engine]:
    """The model on two ranks."""
    engine = Engine.load(checkpoint, dtype="float32", tensor_parallel=2, limits=LIMITS)
    yield engine
    engine.close()


class Heard:
    """What an engine has said of each request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, list[Output]] = {}

    def step(self) -> None:
        """Run one turn and listen; the pages must add up."""
        for turn in self.engine.step():
            for output in turn.outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish_reason is not None:
                    self.ends.setdefault(output.request_id, []).append(output)
        self.engine.loop.scheduler.check()

    def run(self) -> None:
        """Step until nothing is left."""
        while self.engine.has_work:
            self.step()


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 20], ids=lambda steps: f"after-{steps}")
def test_an_abort_in_any_state(engine: Engine, solo: dict[str, list[int]], steps: int) -> None:
    heard = Heard(engine)
    for name in ("first", "second"):
        engine.add_request(PROMPTS[name], PARAMS, request_id=name)
    engine.add_request([*PROMPTS["third"], 40, 41, 42, 43 + steps], SLOW, request_id="aborted")
    # The row limit keeps it waiting.
    engine.add_request(PROMPTS["third"], PARAMS, request_id="third")
    for _ in range(steps):
        heard.step()
    engine.abort("aborted")
    engine.abort("unknown")
    heard.run()
    engine.abort("first")
    heard.step()
    assert {name: [end.finish_reason for end in ends] for name, ends in heard.ends.items()} == {
        "first": [FinishReason.LENGTH],
        "second": [FinishReason.LENGTH],
        "third": [FinishReason.LENGTH],
        "aborted": [FinishReason.ABORT],
    }
    assert {name: heard.tokens[name] for name in PROMPTS} == solo
    assert not engine.loop.scheduler._pages.pool.num_leased


def test_an_id_is_used_again_at_once(engine: Engine, solo: dict[str, list[int]]) -> None:
    heard = Heard(engine)
    engine.add_request(PROMPTS["third"], SLOW, request_id="again")
    for _ in range(3):
        heard.step()
    engine.abort("again")
    heard.step()
    heard.tokens.clear()
    engine.add_request(PROMPTS["first"], PARAMS, request_id="again")
    heard.run()
    assert heard.tokens["again"] == solo["first"]
    assert [end.finish_reason for end in heard.ends["again"]] == [FinishReason.ABORT, FinishReason.LENGTH]


def test_a_row_that_is_no_number_fails_alone(engine: Engine, solo: dict[str, list[int]]) -> None:
    heard = Heard(engine)
    for name in ("first", "second"):
        engine.add_request(PROMPTS[name], PARAMS, request_id=name)
    engine.add_request([3, BAD, 5, 6, 8], PARAMS, request_id="bad")
    engine.add_request(PROMPTS["third"], PARAMS, request_id="third")
    heard.run()
    (end,) = heard.ends["bad"]
    assert end.finish_reason is FinishReason.ERROR
    assert end.error is not None
    assert "bad" in end.error
    assert "not finite" in end.error
    assert {name: heard.tokens[name] for name in PROMPTS} == solo


def test_a_row_that_is_no_number_fails_alone_among_all_ranks(
    checkpoint: str, solo: dict[str, list[int]]
) -> None:
    async def fail_one() -> None:
        async with running(checkpoint, 2) as ranks:
            asked = [
                ranks.ask(index % 2, name, PROMPTS[name], PARAMS)
                for index, name in enumerate(["first", "second", "third"])
            ]
            answers = asyncio.gather(*asked)
            outputs = await ranks.submit(0, "bad", [3, BAD, 5, 6, 8], PARAMS)
            (end,) = [output async for output in outputs if output.finish_reason is not None]
            assert "not finite" in (end.error or "")
            assert dict(zip(PROMPTS, await answers, strict=True)) == solo
            leaving = await ranks.submit(1, "leaving", PROMPTS["third"], SLOW)
            leaving.close()
            assert await ranks.ask(1, "leaving-too", PROMPTS["first"], PARAMS) == solo["first"]

    run(fail_one())


def test_only_rank_0_takes_requests(checkpoint: str) -> None:
    config = EngineConfig(model=checkpoint, tensor_parallel=2, rank=1, rendezvous="127.0.0.1:1")
    with pytest.raises(Exception, match="rank 1 of --tensor-parallel 2 follows; only rank 0 has requests"):
        Engine.load(config)
