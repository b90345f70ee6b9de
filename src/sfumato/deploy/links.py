"""A replica's ends of its links to fronts: claims tickets, sends outputs, notices a front that is gone."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import zmq
from msgspec.structs import replace
from zmq.asyncio import Context as AsyncContext
from zmq.constants import Flag, SocketType
from zmq.sugar.context import Context

from sfumato.core.messages import Submit
from sfumato.deploy.desk import TICKS
from sfumato.deploy.ticket import Front
from sfumato.deploy.wire import (
    Asked,
    Beat,
    Claim,
    Codec,
    FromFront,
    FromReplica,
    Grant,
    Page,
    PageAsked,
    Void,
    Watching,
)

# What was sent last must reach a front before this process goes; one that is gone is waited for no longer.
_LAST_WORDS_MILLISECONDS = 1000

# Called when a front wants nothing of a ticket any more.
OnVoid = Callable[[], None]


@dataclass(slots=True)
class _Ticket:
    """A ticket that was claimed; granted: its request, or None if nobody waits for it."""

    granted: asyncio.Future[Submit | None]
    on_void: OnVoid


@dataclass(slots=True)
class Link:
    """A connected front; quiet: ticks since it was heard."""

    front: Front
    socket: Any
    codec: Codec
    quiet: int = 0
    tickets: dict[str, _Ticket] = field(default_factory=dict)
    reader: asyncio.Task[None] | None = None
    pages: dict[int, asyncio.Future[str]] = field(default_factory=dict)

    async def page(self, token: int) -> str:
        """Return the front's page of metrics."""
        found: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.pages[token] = found
        try:
            self.send(PageAsked(token=token))
            return await found
        finally:
            del self.pages[token]

    async def claim(self, ticket: str, on_void: OnVoid) -> Submit | None:
        """Return the request of a ticket, or None if nobody waits for it; `leave` when it has ended."""
        granted: asyncio.Future[Submit | None] = asyncio.get_running_loop().create_future()
        self.tickets[ticket] = _Ticket(granted, on_void)
        self.send(Claim(ticket=ticket))
        try:
            return await granted
        except BaseException:
            self.leave(ticket)
            raise

    def leave(self, ticket: str) -> None:
        """Want to hear no more of a ticket."""
        self.tickets.pop(ticket, None)

    def send(self, message: FromReplica) -> None:
        """Queue a message."""
        self.socket.send(self.codec.encode(message), Flag.DONTWAIT)

    def void(self, ticket: str) -> None:
        """Take note that nobody waits for a ticket's request."""
        found = self.tickets.pop(ticket, None)
        if found is None:
            return
        if found.granted.done():
            found.on_void()
        else:
            found.granted.set_result(None)


class Links:
    """All fronts that a replica knows. All methods belong to the event loop that made it.

    on_watch: called with whether any front wants steps to name their requests. on_asked: answers a question.
    """

    def __init__(
        self,
        replica: str,
        model: str,
        *,
        silence_seconds: float,
        on_watch: Callable[[bool], None],
        on_asked: Callable[[Link, Asked], None],
    ) -> None:
        self._beat = Beat(replica=replica, model=model)
        self._tick_seconds = silence_seconds / TICKS
        self._on_watch = on_watch
        self._on_asked = on_asked
        self._codec = Codec()
        self._links: dict[Front, Link] = {}
        self._watching: set[Front] = set()
        self._context = Context()
        self._keys = zmq.curve_keypair()
        self._tokens = itertools.count(1)
        self._ticker = asyncio.create_task(self._tick())

    @classmethod
    def of_front(cls, name: str, *, silence_seconds: float) -> Links:
        """Return the links of a front to others: it asks for their pages and serves no model."""
        return cls(
            name,
            "",
            silence_seconds=silence_seconds,
            on_watch=lambda is_on: None,
            on_asked=lambda link, asked: None,
        )

    async def pages(self, fronts: Mapping[str, Front], *, timeout: float) -> dict[str, str]:
        """Return the pages of fronts by their names, of those that answer in time."""
        asking = {
            name: asyncio.create_task(self.to(front).page(next(self._tokens)))
            for name, front in fronts.items()
        }
        if asking:
            await asyncio.wait(asking.values(), timeout=timeout)
        found = {name: task.result() for name, task in asking.items() if task.done()}
        for task in asking.values():
            task.cancel()
        return found

    def to(self, front: Front) -> Link:
        """Return the link to a front; connects where there is none."""
        link = self._links.get(front)
        if link is None:
            socket: Any = AsyncContext.shadow(self._context).socket(SocketType.DEALER)
            socket.curve_serverkey = front.key
            socket.curve_publickey, socket.curve_secretkey = self._keys
            socket.set_hwm(0)
            socket.connect(front.address)
            link = self._links[front] = Link(front, socket, self._codec)
            link.send(self._beat)
            link.reader = asyncio.create_task(self._read(link))
        return link

    def disable(self) -> None:
        """Tell every front that this replica has no engine any more."""
        self._beat = replace(self._beat, is_able=False)
        self.tell(self._beat)

    def tell(self, message: FromReplica) -> None:
        """Send something to every front."""
        for link in self._links.values():
            link.send(message)

    async def close(self) -> None:
        """End all links."""
        self._ticker.cancel()
        for link in list(self._links.values()):
            self._end(link, linger=_LAST_WORDS_MILLISECONDS)
        self._context.term()

    async def _read(self, link: Link) -> None:
        while True:
            message = self._codec.from_front(await link.socket.recv())
            link.quiet = 0
            self._take(link, message)

    def _take(self, link: Link, message: FromFront) -> None:
        match message:
            case Grant(ticket=ticket, submission=submission):
                found = link.tickets.get(ticket)
                if found is not None and not found.granted.done():
                    found.granted.set_result(submission)
            case Void(ticket=ticket):
                link.void(ticket)
            case Watching(is_on=is_on):
                self._watch(link.front, is_on=is_on)
            case Asked():
                self._on_asked(link, message)
            case Page(token=token, text=text):
                asking = link.pages.get(token)
                if asking is not None and not asking.done():
                    asking.set_result(text)

    def _watch(self, front: Front, *, is_on: bool) -> None:
        before = bool(self._watching)
        if is_on:
            self._watching.add(front)
        else:
            self._watching.discard(front)
        if bool(self._watching) != before:
            self._on_watch(bool(self._watching))

    async def _tick(self) -> None:
        """Send signs of life; a front that gives none any more is gone with all it waited for."""
        while True:
            await asyncio.sleep(self._tick_seconds)
            for link in list(self._links.values()):
                link.quiet += 1
                # Twice the silence of the other direction: a front alone cannot be asked again elsewhere.
                if link.quiet > 2 * TICKS:
                    self._end(link)
                else:
                    link.send(self._beat)

    def _end(self, link: Link, *, linger: int = 0) -> None:
        self._links.pop(link.front, None)
        self._watch(link.front, is_on=False)
        if link.reader is not None:
            link.reader.cancel()
        link.socket.close(linger=linger)
        for ticket in list(link.tickets):
            link.void(ticket)
