"""Several engines used as one: an active id, an abort while a request moves, an engine that is killed."""

from __future__ import annotations

import asyncio
import os
import signal

import msgspec
import pytest

from sfumato.config import EngineConfig
from sfumato.core.messages import FinishReason, Submit
from sfumato.core.traits import ModelTraits
from sfumato.engine.frontend import SamplingParams, make_spec
from sfumato.engine.limits import Limits
from sfumato.engine.outputs import Outputs
from sfumato.engine.replicas import Replicas
from sfumato.errors import RequestError

CONFIG = EngineConfig(
    model="sfumato-tiny-sdar",
    dtype="float32",
    device="cpu",
    kv_memory=8 << 20,
    num_threads=1,
    limits=Limits(max_running_requests=1),
)
# One token per step.
SLOW = SamplingParams(
    max_tokens=200,
    ignore_eos=True,
    seed=0,
    algorithm="low_confidence",
    algorithm_parameters={"threshold": 2.0},
)


def submission(replicas: Replicas, name: str) -> Submit:
    """Return a request that lasts."""
    return Submit(request_id=name, spec=make_spec([5, 6, 7], SLOW, replicas.info.traits))


async def refuse_and_move() -> None:
    replicas = await Replicas.start([CONFIG, CONFIG])
    try:
        running = [await replicas.submit([submission(replicas, name)]) for name in ("a", "b")]
        # The other replica does not know the id; it is refused all the same, and the first goes on.
        with pytest.raises(RequestError, match="'a' is already active"):
            await replicas.submit([submission(replicas, "a")])
        for outputs in running:
            assert (await anext(outputs)).error is None
        waiting = [await replicas.submit([submission(replicas, name)]) for name in ("c", "d")]
        assert replicas.num_open == 4
        os.kill(replicas.clients[0].pid, signal.SIGKILL)
        while not replicas.num_gone:
            await asyncio.sleep(0.01)
        # Moving has been begun and not been done: nobody wants one of them any more.
        for outputs in waiting:
            outputs.close()
        for outputs in running:
            ends = [output async for output in outputs]
            assert ends[-1].finish_reason is FinishReason.LENGTH
        await asyncio.sleep(0.2)
        assert replicas.num_open == 0
    finally:
        await replicas.close()


def test_an_active_id_is_refused_and_an_abort_ends_a_move() -> None:
    asyncio.run(refuse_and_move())


async def answers(replicas: Replicas, *, kill: bool) -> list[tuple[int, ...]]:
    """Return the tokens of several answers that are streamed at once; kill: an engine in their middle."""
    traits = replicas.info.traits
    assert isinstance(traits, ModelTraits)
    asked = []
    for number in range(8):
        threshold = (2.0, 0.9, 0.6)[number % 3]
        params = msgspec.structs.replace(
            SLOW,
            seed=number,
            temperature=0.8 * (number % 2),
            algorithm_parameters={"threshold": threshold},
            max_tokens=60 + number,
        )
        spec = make_spec([5, 6, 7 + number], params, traits)
        asked.append(await replicas.submit([Submit(request_id=f"{number}-{kill}", spec=spec)]))
    begun = asyncio.Event()

    async def read(outputs: Outputs) -> tuple[int, ...]:
        tokens: list[int] = []
        async for output in outputs:
            assert output.error is None
            tokens.extend(output.token_ids)
            assert output.usage.completion_tokens == len(tokens)
            if len(tokens) > 10:
                begun.set()
        return tuple(tokens)

    reading = [asyncio.create_task(read(outputs)) for outputs in asked]
    if kill:
        await begun.wait()
        os.kill(replicas.clients[0].pid, signal.SIGKILL)
    return await asyncio.gather(*reading)


async def kill_in_the_middle() -> None:
    config = msgspec.structs.replace(CONFIG, limits=Limits())
    replicas = await Replicas.start([config, config])
    try:
        undisturbed = await answers(replicas, kill=False)
        assert await answers(replicas, kill=True) == undisturbed
        assert replicas.num_gone == 1
        assert replicas.num_retried > 0
        assert replicas.num_open == 0
    finally:
        await replicas.close()


def test_answers_go_on_without_a_seam_when_an_engine_is_killed() -> None:
    asyncio.run(kill_in_the_middle())
