"""What a request brings to its next engine, what its client sees of that, and who ended an engine."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from sfumato.core.messages import CanvasView, FinishReason, Output, Picture, StepProgress, Submit, Usage
from sfumato.core.spec import Decoding, ImageSpec, TextSpec
from sfumato.engine.attempts import MAX_LOSSES, Attempts
from sfumato.engine.client import EngineClient, OutputCallback
from sfumato.engine.outputs import Outputs
from sfumato.engine.replicas import Replicas
from sfumato.errors import DeadlinePassed, EngineDied, EngineError
from tests.fakes import ManualClock, make_traits


def text(request_id: str = "a", *, timeout: float | None = None) -> Submit:
    """Return a request for text."""
    spec = TextSpec(
        prompt_ids=(1, 2), max_tokens=20, block_length=4, decoding=Decoding(algorithm="low_confidence")
    )
    return Submit(request_id=request_id, spec=spec, timeout=timeout)


def said(*tokens: int, nfe: int = 1, **fields: Any) -> Output:
    """Return an output with tokens."""
    usage = Usage(prompt_tokens=2, completion_tokens=len(tokens), denoise_steps=nfe, nfe=nfe)
    return Output(request_id="a", token_ids=tokens, usage=usage, **fields)


def test_the_next_engine_gets_what_was_delivered_and_the_time_that_is_left() -> None:
    clock = ManualClock()
    attempts = Attempts(text(timeout=10.0), now=clock)
    assert attempts.again().spec == text().spec
    assert attempts.take(said(7, 8, nfe=3)) == said(7, 8, nfe=3)
    clock.advance(4.0)
    attempts.lose()
    again = attempts.again()
    assert isinstance(again.spec, TextSpec)
    assert again.spec.delivered == (7, 8)
    assert again.timeout == 6.0
    fresh = attempts.take(said(9, nfe=2))
    assert fresh is not None
    assert fresh.token_ids == (9,)
    assert fresh.usage.nfe == 5
    attempts.lose(is_blamed=False)
    spec = attempts.again().spec
    assert isinstance(spec, TextSpec)
    assert spec.delivered == (7, 8, 9)
    clock.advance(6.0)
    with pytest.raises(DeadlinePassed, match=r"10\.0 seconds are over") as late:
        attempts.again()
    assert attempts.failed(late.value).finish_reason is FinishReason.TIMEOUT


def test_steps_that_a_client_has_seen_are_not_shown_again() -> None:
    def drawn(done: int, *, preview: bool = False) -> Output:
        pictures = ()
        if preview:
            pictures = (
                Picture(index=0, step=done, is_preview=True, num_frames=1, height=1, width=1, pixels=b"123"),
            )
        return Output(request_id="a", step=StepProgress(done=done, total=9), pictures=pictures)

    spec = ImageSpec(prompts=("a",), height=8, width=8, num_inference_steps=9, seeds=(1,), guidance_scale=1.0)
    attempts = Attempts(Submit(request_id="a", spec=spec))
    assert attempts.take(drawn(1)) is not None
    assert attempts.take(drawn(2, preview=True)) is not None
    attempts.lose()
    assert attempts.again().spec == spec
    assert attempts.take(drawn(1)) is None
    assert attempts.take(drawn(2, preview=True)) is None
    assert attempts.is_suspect
    fresh = attempts.take(drawn(3))
    assert fresh is not None
    assert fresh.step == StepProgress(done=3, total=9)
    assert not attempts.is_suspect
    end = attempts.take(Output(request_id="a", finish_reason=FinishReason.STOP))
    assert end is not None


def test_canvases_are_counted_on() -> None:
    view = CanvasView(step=1, start=0, token_ids=(1,), confidence=(0.5,), undecided=(True,))
    attempts = Attempts(text())
    attempts.take(said(nfe=6, canvas=view))
    attempts.lose()
    fresh = attempts.take(said(nfe=1, canvas=view))
    assert fresh is not None
    assert fresh.canvas is not None
    assert fresh.canvas.step == 7


def test_a_request_that_ends_two_engines_at_one_place_is_not_run_again() -> None:
    attempts = Attempts(text())
    attempts.lose()
    attempts.again()
    attempts.lose()
    with pytest.raises(EngineError, match="ended twice at the same place"):
        attempts.again()
    # One that came further in between is not to blame; nor is one whose machine was lost.
    further = Attempts(text())
    for _ in range(2):
        further.lose()
        further.again()
        further.take(said(5))
    further.lose(is_blamed=False)
    further.lose(is_blamed=False)
    further.again()
    further.lose(is_blamed=False)
    with pytest.raises(EngineError, match=f"lost {MAX_LOSSES} engines"):
        further.again()


class ScriptedClient:
    """Stands in for an engine client: takes requests, outputs what a test says, and dies when it says so."""

    def __init__(self) -> None:
        self.config = type("Config", (), {"model": "scripted"})()
        self.info = type("Info", (), {"traits": make_traits()})()
        self.is_gone = False
        self.on_turn: Any = None
        self.takers: dict[str, OutputCallback] = {}
        self.seen: list[Submit] = []
        self.dies_before_accepting = False

    @property
    def num_open(self) -> int:
        """Return how many requests it has."""
        return len(self.takers)

    async def deliver(self, submissions: list[Submit], take: OutputCallback) -> None:
        """Accept requests, or be gone."""
        await asyncio.sleep(0)
        self.seen.extend(submissions)
        if self.dies_before_accepting:
            self.die()
            raise EngineDied("gone")
        for submission in submissions:
            self.takers[submission.request_id] = take

    def say(self, request_id: str, *tokens: int, end: FinishReason | None = None) -> None:
        """Output something of a request."""
        take = self.takers[request_id] if end is None else self.takers.pop(request_id)
        take(Output(request_id=request_id, token_ids=tokens, finish_reason=end))

    def die(self) -> None:
        """End, with all that it has."""
        self.is_gone = True
        takers, self.takers = self.takers, {}
        for request_id, take in takers.items():
            take(Output(request_id=request_id, finish_reason=FinishReason.ERROR, error="gone"))

    def abort(self, request_id: str) -> None:
        """Forget a request."""
        self.takers.pop(request_id, None)


def replicas_of(clients: list[ScriptedClient]) -> Replicas:
    """Use scripted engines as one."""
    return Replicas(cast(list[EngineClient], clients))


async def settle() -> None:
    """Let everything that can go on go on."""
    for _ in range(50):
        await asyncio.sleep(0)


async def outputs_left(outputs: Outputs) -> list[Output]:
    """Return what comes of a request until it ends."""
    async with asyncio.timeout(5):
        return [output async for output in outputs]


async def innocent_and_poison() -> None:
    clients = [ScriptedClient() for _ in range(3)]
    replicas = replicas_of(clients)
    names = ("poison", "b", "c", "d", "e", "f")
    outputs = {name: await replicas.submit([text(name)]) for name in names}
    first = next(client for client in clients if "poison" in client.takers)
    assert len(first.takers) == 2
    companions = [name for name in first.takers if name != "poison"]
    first.die()
    await settle()
    # Both are suspects, each on an engine of its own.
    second = next(client for client in clients if "poison" in client.takers)
    third = next(client for client in clients if client not in (first, second))
    assert all(name in third.takers for name in companions)
    second.die()
    await settle()
    end = (await outputs_left(outputs["poison"]))[-1]
    assert end.finish_reason is FinishReason.ERROR
    assert "ended twice" in (end.error or "")
    # Everybody else is answered by the one that is left, one suspect after another until it has come further.
    waiting = {name for name in names if name != "poison"}
    while waiting:
        await settle()
        running = [name for name in third.takers if name in waiting]
        assert running
        for name in running:
            third.say(name, 4)
            third.say(name, 5, end=FinishReason.STOP)
            waiting.discard(name)
    for name in names[1:]:
        found = await outputs_left(outputs[name])
        assert [token for output in found for token in output.token_ids] == [4, 5], name
        assert found[-1].finish_reason is FinishReason.STOP
    assert not replicas._quarantine.taken
    assert not replicas._open


def test_a_poisonous_request_ends_alone() -> None:
    asyncio.run(innocent_and_poison())


async def dies_before_accepting() -> None:
    clients = [ScriptedClient() for _ in range(3)]
    for client in clients:
        client.dies_before_accepting = True
    replicas = replicas_of(clients)
    with pytest.raises(EngineError, match="ended twice"):
        await replicas.submit([text("a")])
    assert replicas.num_gone == 2
    assert not replicas._open


def test_a_request_that_ends_engines_before_they_accept_it_leaves_the_others() -> None:
    asyncio.run(dies_before_accepting())


async def aborted_apart() -> None:
    clients = [ScriptedClient() for _ in range(2)]
    replicas = replicas_of(clients)
    outputs = [await replicas.submit([text(name)]) for name in ("a", "b", "c", "d")]
    clients[0].die()
    await settle()
    # One of the two suspects waits for the other; it is aborted meanwhile, and the rest go on.
    assert len(clients[1].takers) == 3
    (waits,) = {"a", "b", "c", "d"} - clients[1].takers.keys()
    replicas.abort(waits)
    await settle()
    assert waits not in replicas._open
    for name in list(clients[1].takers):
        clients[1].say(name, 1, end=FinishReason.STOP)
    await settle()
    assert not replicas._open
    assert not replicas._moving
    for each in outputs:
        each.close()


def test_a_suspect_that_waits_can_be_aborted() -> None:
    asyncio.run(aborted_apart())


async def late_apart() -> None:
    clients = [ScriptedClient() for _ in range(2)]
    replicas = replicas_of(clients)
    outputs = {name: await replicas.submit([text(name, timeout=0.05)]) for name in ("a", "b", "c", "d")}
    clients[0].die()
    await settle()
    (waits,) = outputs.keys() - clients[1].takers.keys()
    end = (await outputs_left(outputs[waits]))[-1]
    assert end.finish_reason is FinishReason.TIMEOUT
    for each in outputs.values():
        each.close()


def test_a_suspect_that_waits_too_long_has_timed_out() -> None:
    asyncio.run(late_apart())
