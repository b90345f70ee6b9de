"""The engine in its own process: start, requests, aborts, and every way in which one of the sides ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from sfumato.config import EngineConfig
from sfumato.core.messages import FinishReason, Output, Submit, Turn
from sfumato.engine.client import EngineClient
from sfumato.engine.frontend import SamplingParams, make_spec
from sfumato.errors import ConfigError, EngineDied, EngineError, RequestError
from tests.serve.running import is_running

MODEL = "sfumato-tiny-sdar"
# One token per step, so that a request lasts for hundreds of steps.
SLOW = SamplingParams(
    seed=1,
    max_tokens=400,
    ignore_eos=True,
    algorithm="low_confidence",
    algorithm_parameters={"threshold": 2.0},
)


def submission(
    client: EngineClient, request_id: str, params: SamplingParams, prompt: tuple[int, ...] = (3, 9, 9)
) -> Submit:
    return Submit(
        request_id=request_id, spec=make_spec(prompt, params, client.info.traits), timeout=params.timeout
    )


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def wait_until_gone(pid: int, *, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_running(pid)


async def ends_of(outputs: Any) -> list[Output]:
    return [output async for output in outputs if output.finish_reason is not None]


async def life_of_an_engine() -> None:
    progress = []
    client = await EngineClient.start(EngineConfig(model=MODEL, num_threads=1), progress.append)
    turns: list[Turn] = []
    client.on_turn = turns.append
    try:
        info = client.info
        assert info.name == MODEL
        assert info.has_tokenizer
        assert info.num_parameters > 1e6
        assert info.num_pages > 0
        assert {"llada", "low_confidence", "sdar"} <= set(info.algorithms)
        assert progress[-1].done == progress[-1].total
        await requests_run_together(client)
        await refusals_name_the_field(client)
        await an_abort_frees_the_engine(client, turns)
        await a_pause_keeps_requests(client)
        await a_stop_drains(client)
    finally:
        await client.close()
    assert not is_running(client.pid)
    await client.close()


async def requests_run_together(client: EngineClient) -> None:
    params = SamplingParams(seed=5, max_tokens=20, temperature=1.0, ignore_eos=True)
    texts: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    async for output in await client.submit([submission(client, name, params) for name in texts]):
        texts[output.request_id].extend(output.token_ids)
    assert [len(tokens) for tokens in texts.values()] == [20, 20, 20]
    assert texts["a"] == texts["b"] == texts["c"]
    assert client.num_open == 0


async def refusals_name_the_field(client: EngineClient) -> None:
    good = submission(client, "good", SLOW)
    bad = submission(client, "bad", SamplingParams(seed=1), prompt=(10**6,))
    with pytest.raises(RequestError, match="outside the vocabulary") as refused:
        await client.submit([good, bad])
    assert refused.value.field == "prompt"
    assert client.num_open == 0
    await client.ping(timeout=5)
    outputs = await client.submit([good])
    with pytest.raises(RequestError, match="already active"):
        await client.submit([good])
    outputs.close()
    with pytest.raises(RequestError, match="already active"):
        await client.submit([good])


async def an_abort_frees_the_engine(client: EngineClient, turns: list[Turn]) -> None:
    outputs = await client.submit([submission(client, name, SLOW) for name in ("x-1", "x-10")])
    outputs.abort("x-1")
    outputs.abort("unknown")
    await client.ping(timeout=5)
    gauges = turns[-1].gauges
    assert gauges is not None
    assert gauges.running + gauges.waiting == 1
    outputs.close()
    await client.ping(timeout=5)
    gauges = turns[-1].gauges
    assert gauges is not None
    assert (gauges.running, gauges.waiting, gauges.pages_leased) == (0, 0, 0)


async def a_pause_keeps_requests(client: EngineClient) -> None:
    client.pause()
    outputs = await client.submit([submission(client, "paused", SamplingParams(seed=1, max_tokens=4))])
    await client.ping(timeout=5)
    late = await client.submit([submission(client, "late", SamplingParams(seed=1, timeout=0.05))])
    assert [end.finish_reason for end in await ends_of(late)] == [FinishReason.TIMEOUT]
    client.resume()
    assert len(await ends_of(outputs)) == 1


async def a_stop_drains(client: EngineClient) -> None:
    params = SamplingParams(seed=1, max_tokens=16, ignore_eos=True)
    outputs = await client.submit([submission(client, "last", params)])
    stopping = asyncio.create_task(client.stop(drain=True))
    await asyncio.sleep(0)
    with pytest.raises(EngineError):
        await client.submit([submission(client, "too late", params)])
    assert [end.finish_reason for end in await ends_of(outputs)] == [FinishReason.LENGTH]
    await stopping
    assert not is_running(client.pid)


def test_an_engine_from_start_to_drain() -> None:
    run(life_of_an_engine())


async def killed_engine() -> None:
    client = await EngineClient.start(EngineConfig(model=MODEL, num_threads=1))
    try:
        groups = [await client.submit([submission(client, f"r{index}", SLOW)]) for index in range(3)]
        os.kill(client.pid, signal.SIGKILL)
        started = time.monotonic()
        for group in groups:
            (end,) = await ends_of(group)
            assert end.finish_reason is FinishReason.ERROR
            assert end.error is not None
            assert "gone" in end.error
        with pytest.raises(EngineDied):
            await client.submit([submission(client, "after", SLOW)])
        with pytest.raises(EngineDied):
            await client.ping(timeout=5)
        await client.stop(drain=True)
        assert time.monotonic() - started < 5
    finally:
        await client.close()


def test_a_killed_engine_ends_every_request_at_once() -> None:
    run(killed_engine())


async def impatient_stop() -> None:
    client = await EngineClient.start(EngineConfig(model=MODEL, num_threads=1))
    try:
        outputs = await client.submit([submission(client, "cut", SLOW)])
        draining = asyncio.create_task(client.stop(drain=True))
        await asyncio.sleep(0.05)
        await client.stop(drain=False)
        assert [end.finish_reason for end in await ends_of(outputs)] == [FinishReason.ABORT]
        await draining
    finally:
        await client.close()


def test_a_stop_without_drain_ends_requests_with_a_message() -> None:
    run(impatient_stop())


def test_a_model_that_cannot_load_is_one_error() -> None:
    async def start() -> None:
        with pytest.raises(ConfigError, match="no-such-model"):
            await EngineClient.start(EngineConfig(model="no-such-model"))

    run(start())


_PARENT = """
import asyncio, os, signal
from sfumato.config import EngineConfig
from sfumato.engine.client import EngineClient

async def main():
    client = await EngineClient.start(EngineConfig(model="sfumato-tiny-sdar", num_threads=1))
    print(client.pid, client._folder, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_an_engine_never_outlives_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        number, folder = parent.stdout.readline().split()
        pid = int(number)
        assert Path(folder).stat().st_mode & 0o777 == 0o700
        assert is_running(pid)
        # Neither signal ends an engine by itself: only its parent decides.
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
        assert is_running(pid)
        parent.kill()
    assert wait_until_gone(pid)
    assert not Path(folder).exists()


def test_the_parent_does_not_load_torch() -> None:
    code = "import sys, sfumato.engine.client, sfumato.serve.app; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
