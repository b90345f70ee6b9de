"""How many replicas are wanted, and what a roll tells."""

from __future__ import annotations

import asyncio

import pytest

from sfumato.deploy.roll import FRONT, Member, Roll
from sfumato.deploy.scaling import desired


@pytest.mark.parametrize(
    ("num_requests", "num_replicas", "step_seconds", "target_step", "wanted"),
    [
        (0, 2, 0.0, None, 0),
        (16, 2, 0.0, None, 1),
        (17, 1, 0.0, None, 2),
        (100, 2, 0.0, 0.05, 7),
        # Steps of twice the time want twice the replicas, where requests share them.
        (20, 2, 0.1, 0.05, 4),
        (20, 2, 0.052, 0.05, 2),
        # One long request is not helped by another replica.
        (2, 2, 0.5, 0.05, 1),
    ],
)
def test_replicas_follow_requests_and_steps(
    num_requests: int, num_replicas: int, step_seconds: float, target_step: float | None, wanted: int
) -> None:
    found = desired(
        num_requests=num_requests,
        num_replicas=num_replicas,
        step_seconds=step_seconds,
        target_requests=16,
        target_step=target_step,
    )
    assert found == wanted


def test_a_roll_tells_who_came_and_forgets_who_fell_silent() -> None:
    async def call() -> None:
        now = 0.0
        roll = Roll(lambda: now)
        front = Member(FRONT, "f", "tcp://127.0.0.1:1", b"key")
        version, members = await roll.call(front, -1)
        assert members == [front]
        # A call that knows everybody is held until somebody comes.
        waiting = asyncio.create_task(roll.call(None, version))
        await asyncio.sleep(0)
        helper = Member("prefill m", "h", "tcp://127.0.0.1:2")
        await roll.call(helper, -1)
        version, members = await waiting
        assert members == [front, helper]
        now += 5
        await roll.call(helper, -1)
        now += 5
        again, members = await roll.call(helper, version)
        assert members == [helper]
        assert again != version

    asyncio.run(call())
