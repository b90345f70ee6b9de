"""Several engines used as one: an id that is active, and a request that is aborted while it moves."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from sfumato.config import EngineConfig
from sfumato.core.messages import FinishReason, Submit
from sfumato.engine.frontend import SamplingParams, make_spec
from sfumato.engine.limits import Limits
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
        ends = [output async for output in running[1]]
        assert ends[-1].finish_reason is FinishReason.LENGTH
        await asyncio.sleep(0.2)
        assert replicas.num_open == 0
    finally:
        await replicas.close()


def test_an_active_id_is_refused_and_an_abort_ends_a_move() -> None:
    asyncio.run(refuse_and_move())
