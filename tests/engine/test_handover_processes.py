"""Hand-overs between real processes on loopback: tokens equal; peers that are killed, stopped or wrong."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sfumato.config import EngineConfig
from sfumato.core.messages import FinishReason, Submit, Turn
from sfumato.engine.client import EngineClient
from sfumato.engine.engine import Engine
from sfumato.engine.frontend import SamplingParams, make_spec
from sfumato.engine.limits import Limits
from sfumato.engine.peer_config import PeerConfig, parse_address
from sfumato.errors import ConfigError, RequestError
from tests.engine.faulty_network import FaultyNetwork
from tests.serve.running import is_running

MODEL = "sfumato-tiny-sdar"
SECRET = "only-for-tests"
PARAMS = SamplingParams(seed=7, max_tokens=12, ignore_eos=True)
PROMPTS = {
    f"p{index}": [3 + (index * 31 + place * 7) % 200 for place in range(length)]
    for index, length in enumerate((3, 4, 21, 64, 150, 201))
}


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


def config(peering: PeerConfig, **options: Any) -> EngineConfig:
    return EngineConfig(
        model=MODEL, dtype="float32", num_threads=1, kv_memory=16 << 20, peering=peering, **options
    )


def prefill_config(**peering: Any) -> PeerConfig:
    return PeerConfig(role="prefill", listen="tcp://127.0.0.1:0", **{"secret": SECRET, **peering})


@asynccontextmanager
async def pools(
    num_prefill: int, *, limits: Limits | None = None, **peering: Any
) -> AsyncIterator[tuple[EngineClient, list[EngineClient]]]:
    """Start prefill engines, then a denoise engine that knows their addresses; leave no process behind."""
    clients: list[EngineClient] = []
    try:
        small = config(prefill_config(**peering), limits=limits or Limits())
        prefills = await asyncio.gather(*(EngineClient.start(small) for _ in range(num_prefill)))
        clients.extend(prefills)
        addresses = tuple(prefill.info.peer_address or "" for prefill in prefills)
        asks = PeerConfig(role="denoise", peers=addresses, **{"secret": SECRET, **peering})
        denoise = await EngineClient.start(config(asks))
        clients.append(denoise)
        yield denoise, list(prefills)
    finally:
        await asyncio.gather(*(client.close() for client in clients))
    assert not any(is_running(client.pid) for client in clients)


def watch(client: EngineClient) -> list[Turn]:
    turns: list[Turn] = []
    client.on_turn = turns.append
    return turns


def num_steps(turns: list[Turn], kind: str) -> int:
    return sum(step.kind == kind for turn in turns for step in turn.steps)


async def answers(client: EngineClient, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    """Submit prompts one after another and collect all tokens; each must end once, with a length."""
    groups = []
    for name, prompt in prompts.items():
        spec = make_spec(prompt, PARAMS, client.info.traits)
        groups.append(await client.submit([Submit(request_id=name, spec=spec)]))
    tokens: dict[str, list[int]] = {}
    for group in groups:
        async for output in group:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            assert output.finish_reason in (None, FinishReason.LENGTH), output.error
    return tokens


@pytest.fixture(scope="module")
def local() -> Engine:
    return Engine.load(EngineConfig(model=MODEL, dtype="float32", num_threads=1))


def expected(local: Engine, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    choices = local.generate(list(prompts.values()), PARAMS)
    return {name: choice.token_ids for name, choice in zip(prompts, choices, strict=True)}


# `make test-all` installs it; no run may pass it over silently there.
NIXL = pytest.param(
    "nixl",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="sfumato[nixl] is not installed"),
    ],
)


@pytest.mark.parametrize("transport", ["sockets", NIXL])
@pytest.mark.parametrize("num_prefill", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_pools_answer_as_one_engine_does(local: Engine, num_prefill: int, transport: str) -> None:
    async def serve() -> None:
        async with pools(num_prefill, transport=transport) as (denoise, prefills):
            turns, theirs = watch(denoise), [watch(prefill) for prefill in prefills]
            assert await answers(denoise, PROMPTS) == expected(local, PROMPTS)
            assert num_steps(turns, "prefill") == 0
            assert all(num_steps(own, "prefill") > 0 for own in theirs)
            assert all(num_steps(own, "denoise") == 0 for own in theirs)
            gauges = turns[-1].gauges
            assert gauges is not None
            assert (gauges.running, gauges.waiting, gauges.pages_leased) == (0, 0, 0)
            with pytest.raises(RequestError, match="works for denoise engines"):
                await answers(prefills[0], {"x": [1, 2, 3]})

    run(serve())


LONG = {
    f"long{index}": [3 + (index * 17 + place * 5) % 200 for place in range(201 - index)] for index in range(6)
}
# One block per forward: the prompts take hundreds of forwards, so that a signal comes in their middle.
TINY_STEPS = Limits(max_prefill_tokens=4)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
@pytest.mark.parametrize("transport", ["sockets", NIXL])
def test_a_prefill_process_that_stops_in_the_middle(
    local: Engine, number: signal.Signals, transport: str
) -> None:
    async def serve() -> None:
        pair = pools(1, limits=TINY_STEPS, silence_seconds=1.0, transport=transport)
        async with pair as (denoise, (prefill,)):
            turns, theirs = watch(denoise), watch(prefill)
            asked = asyncio.create_task(answers(denoise, LONG))
            while num_steps(theirs, "prefill") < 5:
                await asyncio.sleep(0.005)
            os.kill(prefill.pid, number)
            try:
                started = time.monotonic()
                assert await asked == expected(local, LONG)
                assert time.monotonic() - started < 20
                assert num_steps(turns, "prefill") > 0
                # New requests do not wait for it.
                assert await answers(denoise, PROMPTS) == expected(local, PROMPTS)
            finally:
                if number is signal.SIGSTOP:
                    os.kill(prefill.pid, signal.SIGCONT)
            if number is signal.SIGSTOP:
                await asyncio.sleep(1.5)
                before = num_steps(theirs, "prefill")
                # It is back, and is asked again.
                again = {"again": [9, *LONG["long0"]]}
                assert await answers(denoise, again) == expected(local, again)
                assert num_steps(theirs, "prefill") > before
            await denoise.ping(timeout=5)
            gauges = turns[-1].gauges
            assert gauges is not None
            assert (gauges.running, gauges.waiting, gauges.pages_leased) == (0, 0, 0)

    run(serve())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("transport", ["sockets", NIXL])
def test_a_denoise_process_that_stops_leaves_nothing_at_the_prefill_engine(
    number: signal.Signals, transport: str
) -> None:
    async def serve() -> None:
        pair = pools(1, limits=TINY_STEPS, silence_seconds=1.0, transport=transport)
        async with pair as (denoise, (prefill,)):
            theirs = watch(prefill)
            asked = asyncio.create_task(answers(denoise, LONG))
            while num_steps(theirs, "prefill") < 5:
                await asyncio.sleep(0.005)
            os.kill(denoise.pid, number)
            until = time.monotonic() + 15
            while time.monotonic() < until:
                await prefill.ping(timeout=10)
                gauges = theirs[-1].gauges
                assert gauges is not None
                if (gauges.running, gauges.waiting, gauges.pages_leased) == (0, 0, 0):
                    break
                await asyncio.sleep(0.05)
            else:
                raise AssertionError(f"still held: {gauges}")
            if number is signal.SIGSTOP:
                # It comes back, and ends every request all the same.
                os.kill(denoise.pid, signal.SIGCONT)
                assert (await asked).keys() == LONG.keys()
            else:
                with pytest.raises(AssertionError, match="is gone"):
                    await asked

    run(serve())


@pytest.mark.slow
def test_a_peer_with_another_secret_or_layout_is_refused() -> None:
    async def serve() -> None:
        prefill = await EngineClient.start(config(prefill_config()))
        try:
            address = prefill.info.peer_address
            assert address is not None
            for options, words in (
                ({"secret": "another"}, "wrong shared secret"),
                ({"page_size": 2}, "page_size is 16 on the prefill side and 2 on the denoise side"),
            ):
                page_size = options.pop("page_size", None)
                asks = PeerConfig(role="denoise", peers=(address,), **{"secret": SECRET, **options})
                with pytest.raises(ConfigError, match=words):
                    await EngineClient.start(config(asks, page_size=page_size))
        finally:
            await prefill.close()

    run(serve())


@pytest.mark.parametrize(
    ("seed", "faults"),
    [
        (1, {"max_delay": 0.02, "double": 0.3}),
        (2, {"drop": 0.2, "double": 0.2, "max_delay": 0.01}),
        (3, {"drop": 0.6}),
    ],
    ids=["delays and doubles", "some of all", "mostly drops"],
)
def test_a_network_that_delays_drops_and_doubles(local: Engine, seed: int, faults: dict[str, float]) -> None:
    async def serve() -> None:
        prefill = await EngineClient.start(config(prefill_config(silence_seconds=1.0)))
        assert prefill.info.peer_address is not None
        host, port = parse_address("peer", prefill.info.peer_address)
        network = FaultyNetwork(host, port, seed, **faults)  # type: ignore[arg-type]
        asks = PeerConfig(
            role="denoise", peers=(network.address,), secret=SECRET, silence_seconds=1.0, prefill_seconds=0.5
        )
        denoise = await EngineClient.start(config(asks))
        turns = watch(denoise)
        try:
            for attempt in range(3):
                prompts = {f"{name}-{attempt}": [*ids, attempt] for name, ids in PROMPTS.items()}
                assert await answers(denoise, prompts) == expected(local, prompts)
            assert network.num_dropped or "drop" not in faults
            assert network.num_doubled or "double" not in faults
            await drained(denoise, turns)
        finally:
            network.close()
            await asyncio.gather(denoise.close(), prefill.close())

    run(serve())


async def drained(client: EngineClient, turns: list[Turn]) -> None:
    """Wait until no page waits for a peer's word any more; asked again and again, it may often be lost."""
    for _ in range(600):
        await client.ping(timeout=5)
        gauges = turns[-1].gauges
        if gauges is not None and gauges.pages_draining == 0 and gauges.pages_leased == 0:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(turns[-1].gauges)


@pytest.mark.parametrize(
    ("peering", "words"),
    [
        (PeerConfig(role="cook"), "--role 'cook' is not one of both, prefill, encode, denoise, decode"),
        (PeerConfig(role="decode"), "--role decode needs --listen"),
        (PeerConfig(role="prefill"), "--role prefill needs --listen"),
        (PeerConfig(role="denoise"), "--role denoise needs --peers"),
        (PeerConfig(role="both", peers=("tcp://a:1",)), "needs --role denoise"),
        (
            PeerConfig(role="prefill", listen="http://a:1", secret="x"),
            "--listen 'http://a:1' is not an address",
        ),
        (PeerConfig(role="prefill", listen="tcp://a:1"), "shared secret"),
        (PeerConfig(role="prefill", listen="tcp://a:1", peers=("tcp://a:2",)), "does not go with --peers"),
        (PeerConfig(role="denoise", listen="tcp://a:1", peers=("tcp://a:2",)), "does not go with --listen"),
        (PeerConfig(transport="pigeon"), "--peer-transport 'pigeon'"),
        (PeerConfig(silence_seconds=0), "--peer-timeout 0"),
    ],
)
def test_options_that_cannot_be_met_are_named(peering: PeerConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(peering).check()


def test_a_bidirectional_model_has_no_prefill_role() -> None:
    with pytest.raises(
        ConfigError, match=r"--role prefill for sfumato-tiny-llada: .*both directions.*0 bytes"
    ):
        Engine.load(EngineConfig(model="sfumato-tiny-llada", peering=prefill_config()))


def test_a_denoise_engine_is_told_who_its_peers_are(local: Engine) -> None:
    async def serve() -> None:
        told = PeerConfig(role="denoise", is_told=True, silence_seconds=1.0)
        denoise = await EngineClient.start(config(told))
        helpers = await asyncio.gather(
            *(EngineClient.start(config(prefill_config(secret=secret))) for secret in ("one", "two"))
        )
        try:
            # Nobody yet: it prefills itself.
            assert await answers(denoise, PROMPTS) == expected(local, PROMPTS)
            for number, (helper, secret) in enumerate(zip(helpers, ("one", "two"), strict=True)):
                theirs = watch(helper)
                denoise.meet([(str(helper.info.peer_address), secret)])
                for attempt in range(40):
                    prompts = {f"{number}-{attempt}": [number, attempt, *LONG["long0"]]}
                    assert await answers(denoise, prompts) == expected(local, prompts)
                    if num_steps(theirs, "prefill"):
                        break
                    await asyncio.sleep(0.1)
                assert num_steps(theirs, "prefill")
            # The first one is asked no more.
            theirs = watch(helpers[0])
            assert await answers(denoise, LONG) == expected(local, LONG)
            assert num_steps(theirs, "prefill") == 0
        finally:
            await asyncio.gather(*(client.close() for client in (denoise, *helpers)))

    run(serve())
