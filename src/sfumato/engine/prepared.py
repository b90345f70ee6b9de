"""An inbox that holds requests back until their grammars are compiled, so that no step waits for one."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Protocol

from sfumato.core.handover import PeerEvent
from sfumato.core.messages import Abort, Message, Stop, Submit
from sfumato.core.protocols import Inbox
from sfumato.core.spec import Grammar, TextSpec


class Preparing(Protocol):
    """Compiles grammars in a thread of its own."""

    def prepare(self, grammar: Grammar) -> Future[Any]:
        """Return the automaton to come; an error in it is the door's to raise."""
        ...


class PreparedInbox:
    """Passes messages on; a submission with a new grammar comes once that is compiled, in its own time.

    What concerns a request that is held back, or ends the engine, lets it through first: the door then waits.
    """

    def __init__(self, inbox: Inbox, grammars: Preparing) -> None:
        self._inbox = inbox
        self._grammars = grammars
        self._held: dict[str, tuple[Submit, Future[Any]]] = {}
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._poll = select.poll()
        for number in self.filenos():
            self._poll.register(number, select.POLLIN)

    def filenos(self) -> list[int]:
        """Return those of the inbox, and what becomes readable when a grammar is compiled."""
        return [self._event, *self._inbox.filenos()]

    @property
    def is_called(self) -> bool:
        """Whether another rank waits for this one's next turn."""
        return self._inbox.is_called

    def drain(self, *, wait_seconds: float | None) -> list[Message | PeerEvent]:
        """Return all that is there; where it may wait, for the first that comes."""
        found = list(self._take())
        if not found and wait_seconds != 0 and not self.is_called:
            self._poll.poll(None if wait_seconds is None else max(1, int(wait_seconds * 1000)))
            found = list(self._take())
        return found

    def _take(self) -> Iterator[Message | PeerEvent]:
        with_news: Iterable[Message | PeerEvent] = self._inbox.drain(wait_seconds=0)
        for message in with_news:
            match message:
                case Submit(spec=TextSpec(grammar=Grammar() as grammar), request_id=request_id):
                    yield from self._release(request_id)
                    compiling = self._grammars.prepare(grammar)
                    if compiling.done():
                        yield message
                    else:
                        self._held[request_id] = message, compiling
                        compiling.add_done_callback(lambda _: os.eventfd_write(self._event, 1))
                case Submit(request_id=request_id) | Abort(request_id=request_id):
                    yield from self._release(request_id)
                    yield message
                case Stop():
                    yield from self._release(*self._held)
                    yield message
                case _:
                    yield message
        if self._held:
            try:
                os.eventfd_read(self._event)
            except BlockingIOError:
                return
            yield from self._release(*(name for name, (_, made) in self._held.items() if made.done()))

    def _release(self, *request_ids: str) -> Iterator[Submit]:
        for request_id in request_ids:
            if request_id in self._held:
                yield self._held.pop(request_id)[0]
