"""Requests wait for their grammars in the inbox, and nobody waits with them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from sfumato.core.messages import Abort, Message, Ping, Stop, Submit
from sfumato.core.spec import Decoding, Grammar, TextSpec
from sfumato.engine.prepared import PreparedInbox


class Mail:
    """An inbox whose messages a test puts there."""

    is_called = False

    def __init__(self) -> None:
        self.event = os.eventfd(0, os.EFD_NONBLOCK)
        self.messages: list[Message] = []

    def filenos(self) -> list[int]:
        return [self.event]

    def put(self, *messages: Message) -> None:
        self.messages += messages
        os.eventfd_write(self.event, 1)

    def drain(self, *, wait_seconds: float | None) -> list[Message]:
        assert wait_seconds == 0
        taken, self.messages = self.messages, []
        if taken:
            os.eventfd_read(self.event)
        return taken


class Compiler:
    """Grammars that are compiled when a test says so."""

    def __init__(self) -> None:
        self.made: dict[str, Future[Any]] = {}

    def prepare(self, grammar: Grammar) -> Future[Any]:
        return self.made.setdefault(grammar.source, Future())


@pytest.fixture
def parts() -> Iterator[tuple[Mail, Compiler, PreparedInbox]]:
    mail, compiler = Mail(), Compiler()
    yield mail, compiler, PreparedInbox(mail, compiler)
    os.close(mail.event)


def submit(name: str, source: str | None = None) -> Submit:
    """Return a request, with a grammar of this source."""
    grammar = None if source is None else Grammar(kind="regex", source=source)
    spec = TextSpec(
        prompt_ids=(1,), max_tokens=4, block_length=4, decoding=Decoding(algorithm="llada"), grammar=grammar
    )
    return Submit(request_id=name, spec=spec)


def ids(messages: list[Any]) -> list[str]:
    return [getattr(message, "request_id", type(message).__name__) for message in messages]


def test_a_request_waits_for_its_grammar_and_no_other_does(
    parts: tuple[Mail, Compiler, PreparedInbox],
) -> None:
    mail, compiler, inbox = parts
    mail.put(submit("A", "a"), submit("B"), submit("C", "a"))
    assert ids(inbox.drain(wait_seconds=0)) == ["B"]
    assert inbox.drain(wait_seconds=0) == []
    compiler.made["a"].set_result(None)
    assert ids(inbox.drain(wait_seconds=0)) == ["A", "C"]
    mail.put(submit("D", "a"))
    assert ids(inbox.drain(wait_seconds=0)) == ["D"]


def test_a_compiled_grammar_wakes_who_sleeps(parts: tuple[Mail, Compiler, PreparedInbox]) -> None:
    mail, compiler, inbox = parts
    mail.put(submit("A", "a"))
    assert inbox.drain(wait_seconds=0) == []
    threading.Timer(0.05, lambda: compiler.made["a"].set_exception(ValueError("wrong"))).start()
    started = time.monotonic()
    assert ids(inbox.drain(wait_seconds=20)) == ["A"]
    assert time.monotonic() - started < 10


def test_what_concerns_a_waiting_request_comes_behind_it(parts: tuple[Mail, Compiler, PreparedInbox]) -> None:
    mail, _, inbox = parts
    mail.put(submit("A", "a"), Ping(token=1))
    assert ids(inbox.drain(wait_seconds=0)) == ["Ping"]
    mail.put(Abort(request_id="A"))
    assert ids(inbox.drain(wait_seconds=0)) == ["A", "A"]
    mail.put(submit("B", "a"))
    assert inbox.drain(wait_seconds=0) == []
    mail.put(submit("B"))
    assert ids(inbox.drain(wait_seconds=0)) == ["B", "B"]
    mail.put(submit("E", "a"), submit("F", "b"))
    assert inbox.drain(wait_seconds=0) == []
    mail.put(Stop(drain=True))
    assert ids(inbox.drain(wait_seconds=0)) == ["E", "F", "Stop"]
    assert inbox.drain(wait_seconds=0) == []
