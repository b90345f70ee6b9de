"""Requests over replicas that die, fall silent or leave: each answer is whole, and the same."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from typing import Any

import pytest

from sfumato.core.messages import FinishReason, Output
from sfumato.engine.frontend import SamplingParams
from sfumato.errors import EngineDied, RequestError
from tests.deploy.running import MODEL, SLOW, Mute, cluster, collect, submission, tokens
from tests.serve.running import is_running

NAMES = [f"request {number}" for number in range(4)]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def ends(outputs: list[Output]) -> list[FinishReason]:
    return [output.finish_reason for output in outputs if output.finish_reason is not None]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}

    async def serve() -> None:
        async with cluster(1) as one:
            found = await collect(one.front, [submission(one.front, name) for name in NAMES])
            answers.update({name: tokens(outputs) for name, outputs in found.items()})
            pids = [worker.engine.pid for worker in one.workers.values()]
        assert not any(is_running(pid) for pid in pids)

    run(serve())
    assert all(len(answer) == SLOW.max_tokens for answer in answers.values())
    return answers


@pytest.mark.parametrize(
    "how",
    [
        "engine killed",
        *(
            pytest.param(how, marks=pytest.mark.slow)
            for how in ("engine stopped", "replica gone", "replica silent")
        ),
    ],
)
def test_a_lost_replica_loses_nothing(undisturbed: dict[str, list[int]], how: str) -> None:
    async def serve() -> None:
        async with cluster(2, stall_seconds=1.0) as two:
            asking = asyncio.create_task(collect(two.front, [submission(two.front, name) for name in NAMES]))
            while len(two.tickets) < len(NAMES):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            lost = two.workers["w1"]
            match how:
                case "engine killed":
                    os.kill(lost.engine.pid, signal.SIGKILL)
                case "engine stopped":
                    os.kill(lost.engine.pid, signal.SIGSTOP)
                case "replica gone":
                    await two.kill("w1")
                case "replica silent":
                    # Its messages stay away, and what it says later is nobody's.
                    for link in lost._links._links.values():
                        link.socket = Mute(link.socket)
                    two.deaf.add("w1")
            found = await asking
            assert len(two.tickets) > len(NAMES)
            assert {name: tokens(outputs) for name, outputs in found.items()} == undisturbed
            assert all(ends(outputs) == [FinishReason.LENGTH] for outputs in found.values())
            await asyncio.sleep(0.1)
            assert two.front.num_open == 0

    run(serve())


def test_a_poisonous_request_ends_with_its_own_error_and_takes_no_other_along(
    undisturbed: dict[str, list[int]],
) -> None:
    async def serve() -> None:
        async with cluster(3) as three:
            poison = submission(three.front, "poison")

            async def kill_what_runs_it() -> None:
                # Whoever claims it is killed, as an engine is that a request makes run out of memory.
                killed: set[str] = set()
                while len(killed) < 2:
                    await asyncio.sleep(0.01)
                    for name, worker in three.workers.items():
                        ids = list(worker.engine._takers)
                        if name not in killed and any("poison" in request_id for request_id in ids):
                            killed.add(name)
                            os.kill(worker.engine.pid, signal.SIGKILL)

            killing = asyncio.create_task(kill_what_runs_it())
            others = [submission(three.front, name) for name in NAMES]
            poisoned, found = await asyncio.gather(
                collect(three.front, [poison]), collect(three.front, others)
            )
            await killing
            assert ends(poisoned["poison"]) == [FinishReason.ERROR]
            assert "ended twice at the same place" in str(poisoned["poison"][-1].error)
            assert {name: tokens(outputs) for name, outputs in found.items()} == undisturbed

    run(serve())


def test_a_request_that_no_replica_takes_waits_and_then_ends() -> None:
    async def serve() -> None:
        async with cluster(2, claim_seconds=0.2, wait_seconds=1.0) as two:
            two.deaf.update(two.workers)
            with pytest.raises(EngineDied, match="no replica took request 'r' within"):
                await two.front.submit([submission(two.front, "r")])
            timely = await collect(two.front, [submission(two.front, "t", timeout=0.3)])
            assert ends(timely["t"]) == [FinishReason.TIMEOUT]
            two.deaf.discard("w1")
            found = await collect(
                two.front, [submission(two.front, "s", SamplingParams(max_tokens=4, seed=0))]
            )
            assert ends(found["s"])

    run(serve())


def test_a_refusal_an_abort_and_a_double_id() -> None:
    async def serve() -> None:
        async with cluster(1) as one:
            engine = one.workers["w0"].engine
            first = await one.front.submit([submission(one.front, "a")])
            with pytest.raises(RequestError, match="already active"):
                await one.front.submit([submission(one.front, "a")])
            wrong = SamplingParams(max_tokens=4, seed=0, algorithm_parameters={"threshold": "high"})
            with pytest.raises(RequestError):
                await one.front.submit([submission(one.front, "b", wrong)])
            assert (await anext(first)).error is None
            first.close()
            while engine.num_open:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert one.front.num_open == 0
            await one.front.ping(timeout=5)
            assert one.front.clients == ["w0"]

    run(serve())


def test_steps_and_gauges_reach_the_front() -> None:
    async def serve() -> None:
        async with cluster(2) as two:
            turns = []
            two.front.on_turn = turns.append
            await collect(two.front, [submission(two.front, name) for name in NAMES])
            await asyncio.sleep(0.6)
            assert sum(step.kind == "denoise" for turn in turns for step in turn.steps) > 100
            assert turns[-1].gauges is not None
            pages = [worker.gauges.pages_free for worker in two.workers.values()]
            assert turns[-1].gauges.pages_free == sum(pages)
            assert MODEL in two.desk.on_turn

    run(serve())
