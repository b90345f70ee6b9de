"""Ranks with requests of their own that share weights: real processes, each with its own inbox and outbox."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sfumato.config import EngineConfig
from sfumato.core.messages import FinishReason, Submit, Turn
from sfumato.engine.client import EngineClient
from sfumato.engine.engine import Engine
from sfumato.engine.frontend import SamplingParams, make_spec
from sfumato.errors import ConfigError, EngineDied
from tests.models.checkpoints import LLADA2, random_weights, write
from tests.serve.running import is_running

SDAR = "sfumato-tiny-sdar"
PARAMS = SamplingParams(seed=1, max_tokens=8, ignore_eos=True)
SLOW = SamplingParams(
    seed=1,
    max_tokens=40,
    ignore_eos=True,
    algorithm="low_confidence",
    algorithm_parameters={"threshold": 2.0},
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model with experts."""
    return str(write(tmp_path_factory.mktemp("shared") / "model", LLADA2, random_weights(LLADA2)))


class Ranks:
    """Engines that share weights, and what each of them has told."""

    def __init__(self, clients: list[EngineClient]) -> None:
        self.clients = clients
        self.turns: list[list[Turn]] = [[] for _ in clients]
        for client, turns in zip(clients, self.turns, strict=True):
            client.on_turn = turns.append

    def kinds(self, rank: int) -> list[str]:
        """Return the kind of each step that a rank has made."""
        return [step.kind for turn in self.turns[rank] for step in turn.steps]

    def forget(self) -> None:
        """Begin to count anew."""
        for turns in self.turns:
            turns.clear()

    async def ask(self, rank: int, request_id: str, prompt: list[int], params: SamplingParams) -> list[int]:
        """Return the tokens of one request."""
        tokens: list[int] = []
        async for output in await self.submit(rank, request_id, prompt, params):
            assert output.error is None, output.error
            tokens.extend(output.token_ids)
        return tokens

    async def submit(self, rank: int, request_id: str, prompt: list[int], params: SamplingParams) -> Any:
        """Hand one request over and return its outputs."""
        client = self.clients[rank]
        spec = make_spec(prompt, params, client.info.traits)
        return await client.submit([Submit(request_id=request_id, spec=spec)])

    async def settle(self) -> None:
        """Wait until every rank has made the turn in which all agree that they are idle."""
        await asyncio.gather(*(client.ping(timeout=10) for client in self.clients))
        await asyncio.sleep(0.05)


def shared_ranks(config: EngineConfig, size: int) -> list[EngineConfig]:
    """Return the configuration of each rank; they meet at an address that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    return [
        msgspec.structs.replace(config, data_parallel_attention=size, rank=rank, rendezvous=address)
        for rank in range(size)
    ]


@asynccontextmanager
async def running(model: str, size: int, **options: Any) -> AsyncIterator[Ranks]:
    """Start ranks and end them; none is left."""
    configs = shared_ranks(EngineConfig(model=model, dtype="float32", num_threads=1, **options), size)
    clients = await asyncio.gather(*map(EngineClient.start, configs))
    try:
        yield Ranks(clients)
    finally:
        await asyncio.gather(*(client.close() for client in clients))
    assert not any(is_running(client.pid) for client in clients)


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test with a bound."""
    asyncio.run(asyncio.wait_for(test, 90))


def prompt_of(index: int) -> list[int]:
    """Return a prompt of its own length and tokens."""
    return [1 + (7 * index + 3 * step) % 80 for step in range(2 + 5 * index % 17)]


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def each_answers_as_alone(ranks: Ranks, model: str) -> None:
    alone = Engine.load(model, dtype="float32")
    size = len(ranks.clients)
    several = [PARAMS, SamplingParams(seed=2, max_tokens=13, temperature=0.8), SLOW]
    prompts = [prompt_of(index) for index in range(3 * size)]
    params = [several[index % 3] for index in range(3 * size)]
    expected = [choice.token_ids for choice in alone.generate(prompts, params)]
    found = await asyncio.gather(
        *(
            ranks.ask(index % size, f"r{index}", prompt, each)
            for index, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        )
    )
    assert found == expected


async def idle_ranks_run_only_beside_rows(ranks: Ranks) -> None:
    """Table: prefill + nothing, denoise + nothing, nothing + nothing."""
    await ranks.settle()
    ranks.forget()
    used = [cpu_seconds(client.pid) for client in ranks.clients]
    await asyncio.sleep(1.0)
    assert all(
        cpu_seconds(client.pid) - before < 0.2 for client, before in zip(ranks.clients, used, strict=True)
    )
    assert not any(ranks.kinds(rank) for rank in range(len(ranks.clients)))
    await ranks.ask(0, "lonely", prompt_of(50), PARAMS)
    await ranks.settle()
    busy = ranks.kinds(0)
    assert {"prefill", "denoise"} <= set(busy)
    assert "idle" not in busy
    for rank in range(1, len(ranks.clients)):
        assert ranks.kinds(rank) == ["idle"] * len(busy)


async def unlike_rows_run_together(ranks: Ranks) -> None:
    """Table: denoise + denoise, denoise + prefill; a rank that turns idle goes on beside the other."""
    await ranks.settle()
    ranks.forget()
    long = asyncio.create_task(ranks.ask(0, "long", prompt_of(2), SLOW))
    while "denoise" not in ranks.kinds(0):
        await asyncio.sleep(0.005)
    short = await ranks.ask(1, "short", prompt_of(60), SamplingParams(seed=3, max_tokens=4, ignore_eos=True))
    assert len(short) == 4
    assert not long.done()
    assert len(await long) == 40
    await ranks.settle()
    first, second = ranks.kinds(0), ranks.kinds(1)
    assert len(first) == len(second)
    pairs = set(zip(first, second, strict=True))
    assert {("denoise", "idle"), ("denoise", "prefill"), ("denoise", "denoise")} <= pairs
    assert ("idle", "idle") not in pairs


async def any_rank_wakes_all(ranks: Ranks) -> None:
    """Situation 36: while all are idle, while another is busy, just as it turns idle."""
    size, rng = len(ranks.clients), random.Random(5)
    expected = [await ranks.ask(0, f"alone-{index}", prompt_of(index), PARAMS) for index in range(4)]
    for rank in range(size):
        await ranks.settle()
        assert await ranks.ask(rank, f"woken-{rank}", prompt_of(rank), PARAMS) == expected[rank]
    for count in range(8):
        first, second = rng.sample(range(size), 2)
        early = asyncio.create_task(ranks.ask(first, f"early-{count}", prompt_of(1), PARAMS))
        if count % 2:
            await early
        await asyncio.sleep(rng.random() * 0.03)
        late = await ranks.ask(second, f"late-{count}", prompt_of(2), PARAMS)
        assert (await early, late) == (expected[1], expected[2])


async def a_failure_of_one_rank_stays_there(ranks: Ranks) -> None:
    """An abort, a duplicate id and a pause concern one rank alone."""
    going_on = asyncio.create_task(ranks.ask(1, "going-on", prompt_of(2), SLOW))
    outputs = await ranks.submit(0, "aborted", prompt_of(1), SLOW)
    outputs.close()
    ranks.clients[0].pause()
    assert len(await going_on) == 40
    held = asyncio.create_task(ranks.ask(0, "held", prompt_of(1), PARAMS))
    assert await ranks.ask(1, "beside", prompt_of(1), PARAMS)
    assert not held.done()
    ranks.clients[0].resume()
    assert await held


async def a_stop_waits_for_the_last_rank(ranks: Ranks) -> None:
    """A rank that has drained serves the others until all have."""
    outputs = await ranks.submit(1, "last", prompt_of(2), SLOW)
    stopping = [asyncio.create_task(client.stop(drain=True)) for client in ranks.clients]
    ends = [output async for output in outputs if output.finish_reason is not None]
    assert ends[0].finish_reason is FinishReason.LENGTH
    await asyncio.wait_for(asyncio.gather(*stopping), 15)
    assert [client._process.returncode for client in ranks.clients] == [0] * len(ranks.clients)


async def life_of(model: str, size: int, graphs: str) -> None:
    async with running(model, size, graphs=graphs) as ranks:
        await each_answers_as_alone(ranks, model)
        await idle_ranks_run_only_beside_rows(ranks)
        await unlike_rows_run_together(ranks)
        await any_rank_wakes_all(ranks)
        await a_failure_of_one_rank_stays_there(ranks)
        await a_stop_waits_for_the_last_rank(ranks)


@pytest.mark.parametrize(("size", "graphs"), [(2, "off"), (3, "off"), (3, "on")])
def test_ranks_share_experts(checkpoint: str, size: int, graphs: str) -> None:
    run(life_of(checkpoint, size, graphs))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "graphs"), [(2, "off"), (3, "on")])
def test_ranks_share_experts_a_step_ahead(checkpoint: str, size: int, graphs: str) -> None:
    async def live() -> None:
        async with running(checkpoint, size, overlap="on", graphs=graphs) as ranks:
            await each_answers_as_alone(ranks, checkpoint)
            await any_rank_wakes_all(ranks)
            await a_failure_of_one_rank_stays_there(ranks)
            await a_stop_waits_for_the_last_rank(ranks)

    run(live())


@pytest.mark.slow
def test_ranks_share_mlps_where_there_are_no_experts() -> None:
    async def answer() -> None:
        async with running(SDAR, 2) as ranks:
            await each_answers_as_alone(ranks, SDAR)

    run(answer())


async def ends_after(
    checkpoint: str, act: Callable[[Ranks], None], *, is_busy: bool, overlap: str, graphs: str
) -> list[str]:
    """Return what the requests and the next submission were told after something was done to rank 1."""
    async with running(checkpoint, 2, rank_timeout=1.0, overlap=overlap, graphs=graphs) as ranks:
        outputs = await ranks.submit(0, "open", prompt_of(1), SLOW) if is_busy else None
        await asyncio.sleep(0.1)
        started = time.monotonic()
        act(ranks)
        told = []
        if outputs is not None:
            told = [output.error or "" async for output in outputs if output.finish_reason is not None]
        try:
            await ranks.ask(0, "next", prompt_of(1), PARAMS)
        except (EngineDied, AssertionError) as error:
            told.append(str(error))
        assert time.monotonic() - started < 6
        assert ranks.clients[0].is_gone or ranks.clients[0]._process.poll() is not None
        return told


@pytest.mark.parametrize(
    ("is_busy", "overlap", "graphs"),
    [(True, "off", "off"), (True, "on", "off"), (True, "off", "on"), (False, "off", "off")],
    ids=["busy", "overlapped", "replaying", "idle"],
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_ends_all_of_them(
    checkpoint: str,
    number: signal.Signals,
    is_busy: bool,
    overlap: str,
    graphs: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def lose() -> None:
        kill = lambda ranks: os.kill(ranks.clients[1].pid, number)
        told = await ends_after(checkpoint, kill, is_busy=is_busy, overlap=overlap, graphs=graphs)
        assert told
        assert all("is gone" in message for message in told)

    run(lose())
    said = capfd.readouterr().err
    assert ("rank 1 has ended" if number is signal.SIGKILL else "not answered for 1 s") in said
    assert "Traceback" not in said


def test_combinations_that_cannot_work_are_refused(checkpoint: str) -> None:
    both = EngineConfig(model=SDAR, tensor_parallel=2, data_parallel_attention=2)
    with pytest.raises(ConfigError, match="--tensor-parallel 2 and --data-parallel-attention with 2 ranks"):
        both.check()
    with pytest.raises(ConfigError, match="2 ranks of --data-parallel-attention need a rendezvous"):
        EngineConfig(model=SDAR, data_parallel_attention=2).check()
    with pytest.raises(ConfigError, match="rank 2 is not one of the 2 ranks"):
        EngineConfig(model=SDAR, data_parallel_attention=2, rank=2, rendezvous="127.0.0.1:1").check()
    with pytest.raises(ConfigError, match="an engine that its caller steps cannot be one"):
        Engine.load(SDAR, data_parallel_attention=2, rendezvous="127.0.0.1:1")

    async def too_many() -> None:
        config = shared_ranks(EngineConfig(model=checkpoint), 13)[0]
        with pytest.raises(ConfigError, match="--data-parallel-attention 13: 13 ranks: the model's 12 exp"):
            await EngineClient.start(config)

    run(too_many())
