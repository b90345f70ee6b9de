"""Requests to a server that answers by a script: what is measured, what is sent when, what fails."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from sfumato.evaluation.address import Address
from sfumato.evaluation.load.arrivals import Load, arrival_times
from sfumato.evaluation.load.asking import Asker, Endpoint, ImageEndpoint, TextEndpoint
from sfumato.evaluation.load.driving import drive
from sfumato.evaluation.load.prompts import Prompt, find_tokenizer
from sfumato.evaluation.load.records import Record
from tests.evaluation.load.fake_server import MODEL, PAUSE, Script, fake_server

CHAT = TextEndpoint(MODEL, True, {})


def records_of(
    script: Script, load: Load, count: int = 1, *, endpoint: Endpoint = CHAT, timeout: float = 30.0
) -> list[Record]:
    """Send so many requests and return their records."""

    async def run(url: str) -> list[Record]:
        asker = Asker(Address(url, "key"), endpoint, timeout=timeout)
        prompts = [Prompt(f"question {index}", 16) for index in range(count)]
        seen: list[Record] = []
        async with asker.client:
            found = await drive(asker, prompts, load, seed=0, on_record=seen.append)
        assert sorted(record.index for record in seen) == list(range(count))
        return found

    with fake_server(script) as url:
        return asyncio.run(run(url))


@pytest.mark.parametrize("is_chat", [True, False])
def test_each_piece_of_text_has_its_time(is_chat: bool) -> None:
    endpoint = TextEndpoint(MODEL, is_chat, {"algorithm": "x", "max_tokens": 4})
    script = Script()
    (record,) = records_of(script, Load(concurrency=1), endpoint=endpoint)
    assert record.is_ok
    assert len(record.chunks) == 3
    assert record.due <= record.sent < record.chunks[0] < record.chunks[1] < record.chunks[2] <= record.ended
    # The server sleeps that long at least.
    assert record.chunks[0] - record.sent >= PAUSE
    assert min(record.gaps) > PAUSE / 2
    assert (record.prompt_tokens, record.output_tokens, record.nfe) == (7, 12, 4)
    assert (record.counted_by, record.finish_reason) == ("usage", "length")
    (body,) = script.bodies
    asked = {"messages": [{"role": "user", "content": "question 0"}]} if is_chat else {"prompt": "question 0"}
    assert body == {
        "model": MODEL,
        "stream": True,
        "stream_options": {"include_usage": True},
        "algorithm": "x",
        "max_tokens": 4,
        **asked,
    }
    assert script.keys == ["Bearer key"]


def test_without_usage_tokens_are_counted() -> None:
    load = Load(concurrency=1)
    (record,) = records_of(Script(has_usage=False), load)
    assert (record.output_tokens, record.counted_by) == (3, "chunks")
    tokenizer = find_tokenizer(None, "sfumato-tiny-sdar")
    assert tokenizer is not None
    endpoint = TextEndpoint(MODEL, True, {}, tokenizer)
    (record,) = records_of(Script(has_usage=False), load, endpoint=endpoint)
    expected = len(tokenizer.encode("one two three", add_special_tokens=False))
    assert (record.output_tokens, record.counted_by) == (expected, "tokenizer")


def test_previews_of_pictures_are_timed() -> None:
    script = Script(pieces=("a", "b"))
    endpoint = ImageEndpoint(MODEL, 2, {"size": "64x64"})
    (record,) = records_of(script, Load(concurrency=1), endpoint=endpoint)
    assert record.is_ok
    assert len(record.chunks) == 2
    assert record.time_to_first is not None
    assert record.time_to_first < record.end_to_end
    assert (record.nfe, record.output_tokens) == (20, None)
    assert script.bodies[0]["partial_images"] == 2
    assert script.bodies[0]["stream"] is True


def test_a_closed_loop_keeps_so_many_open() -> None:
    script = Script()
    records = records_of(script, Load(concurrency=3), 12)
    assert [record.index for record in records] == list(range(12))
    assert len(script.bodies) == 12
    assert script.most_open <= 3
    for record in records:
        others = [other for other in records if other is not record]
        assert sum(other.sent <= record.sent < other.ended for other in others) <= 2


def test_an_open_loop_sends_while_others_are_open() -> None:
    script = Script(first_pause=1.0)
    load = Load(is_open=True, rate=100.0)
    records = records_of(script, load, 8)
    assert [record.due for record in records] == pytest.approx(arrival_times(load, 8, seed=0))
    assert all(record.lag >= 0 for record in records)
    # All were due before the first had its answer.
    assert max(record.sent for record in records) < min(record.ended for record in records)


def test_a_request_that_waits_to_be_sent_counts_from_when_it_was_due() -> None:
    records = records_of(Script(), Load(is_open=True, concurrency=1), 4)
    assert [record.due for record in records] == pytest.approx([0.0] * 4, abs=1e-6)
    in_order = sorted(records, key=lambda record: record.sent)
    for earlier, later in itertools.pairwise(in_order):
        assert later.sent >= earlier.ended
    # Three pauses for each answer before it.
    assert in_order[-1].end_to_end >= 4 * 3 * PAUSE
    assert in_order[-1].lag >= 3 * 3 * PAUSE


@pytest.mark.parametrize(
    ("script", "timeout", "reason"),
    [
        (Script(fails=lambda number: True), 30.0, "no such field"),
        (Script(breaks_off=True), 30.0, "no finish reason"),
        (Script(error_in_stream=True), 30.0, "the engine is gone"),
        (Script(first_pause=1.0), 0.1, "not answered within 0.1 seconds"),
    ],
)
def test_a_failure_is_in_the_record(script: Script, timeout: float, reason: str) -> None:
    (record,) = records_of(script, Load(concurrency=1), timeout=timeout)
    assert not record.is_ok
    assert reason in str(record.error)


def test_a_server_that_is_not_there_fails_every_request() -> None:
    async def run() -> list[Record]:
        asker = Asker(Address("http://127.0.0.1:9/v1"), CHAT, timeout=5.0)
        nothing: Any = lambda record: None
        async with asker.client:
            return await drive(asker, [Prompt("a", 1)] * 3, Load(concurrency=2), seed=0, on_record=nothing)

    assert [record.is_ok for record in asyncio.run(run())] == [False] * 3
