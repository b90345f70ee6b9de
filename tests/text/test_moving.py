"""A request as bytes: another engine goes on from it in the middle of a block, with equal tokens."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import torch

from sfumato.core.handover import RequestState
from sfumato.core.spec import ParameterValue, Sampling
from sfumato.errors import EngineError, RequestError
from sfumato.text.plain_state import decode_state, encode_state
from sfumato.text.work import TextWork
from tests.fakes import Harness

Parameters = dict[str, ParameterValue]


def moved(harness: Harness, request_id: str, target: Harness) -> None:
    """Take a request out of one engine and let another go on with it."""
    work = harness.work(request_id)
    state = RequestState(
        known_ids=work.standing(request_id).known_tokens,
        block_length=work.canvas.block_length,
        spec=work.spec,
        canvas=work.snapshot(),
    )
    harness.loop.leave(request_id)
    harness.loop.scheduler.check()
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=RequestState)
    assert received.spec is not None
    assert received.canvas is not None
    fresh = target.door(request_id, received.spec)
    assert isinstance(fresh, TextWork)
    fresh.restore(received.canvas)
    assert fresh.standing(request_id).known_tokens == received.known_ids
    target.loop.enter(request_id, fresh)


@pytest.mark.parametrize(
    ("algorithm", "parameters"),
    [
        ("low_confidence", {"threshold": 2.0}),
        ("sdar", {"remasking_strategy": "sequential"}),
        ("joint_threshold", {"threshold": 0.9, "edit_threshold": 0.2, "max_post_edit_steps": 3}),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_goes_on_elsewhere_in_every_step(
    algorithm: str, parameters: Parameters, temperature: float
) -> None:
    def submit(harness: Harness) -> None:
        harness.submit(
            "a",
            10,
            max_tokens=14,
            algorithm=algorithm,
            parameters=parameters,
            sampling=Sampling(temperature=temperature, seed=5),
            infill=tuple(7 if place in (3, 8, 9) else None for place in range(14)),
        )

    alone = Harness()
    submit(alone)
    alone.run()
    for num_steps in range(1, len(alone.plans)):
        first, second = Harness(), Harness()
        submit(first)
        for _ in range(num_steps):
            first.step()
        if "a" in first.ended:
            continue
        moved(first, "a", second)
        second.run()
        assert first.tokens.get("a", []) + second.tokens["a"] == alone.tokens["a"], num_steps
        usage = second.ended["a"].usage
        assert usage.denoise_steps == alone.ended["a"].usage.denoise_steps


def test_a_state_of_another_canvas_is_refused() -> None:
    harness, target = Harness(), Harness()
    harness.submit("a", 10, max_tokens=14)
    harness.step()
    harness.submit("b", 10, max_tokens=40)
    harness.step()
    other = target.door("b", harness.work("b").spec)
    assert isinstance(other, TextWork)
    with pytest.raises(RequestError, match="does not fit a canvas"):
        other.restore(harness.work("a").snapshot())


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: 3,
        lambda: (1, 2.5, (True, "x"), [4]),
        lambda: torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        lambda: (torch.zeros(0), torch.tensor([True, False])),
    ],
)
def test_states_come_back_as_they_were(make: Callable[[], object]) -> None:
    state = make()
    found = decode_state(encode_state(state))
    assert type(found) is type(state)
    if isinstance(state, torch.Tensor):
        assert found.dtype == state.dtype
        assert torch.equal(found, state)
    elif isinstance(state, tuple) and isinstance(state[0], torch.Tensor):
        assert all(torch.equal(mine, its) for mine, its in zip(found, state, strict=True))
    else:
        assert found == state


def test_a_state_that_is_not_plain_is_named() -> None:
    with pytest.raises(EngineError, match="Harness"):
        encode_state(Harness())
