"""The front's end of all links to replicas: hands out requests, takes outputs, notices silence."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import zmq
from zmq.asyncio import Context as AsyncContext
from zmq.constants import Flag, SocketType
from zmq.error import ZMQError
from zmq.sugar.context import Context

from sfumato.core.messages import Output, Refusal, Submit, Turn
from sfumato.deploy.ticket import Front
from sfumato.deploy.wire import (
    Accepted,
    Answered,
    Asked,
    Beat,
    Claim,
    Codec,
    FromFront,
    FromReplica,
    Grant,
    Lost,
    News,
    Page,
    PageAsked,
    Refused,
    Told,
    Void,
    Watching,
)
from sfumato.errors import ConfigError, EngineDied

# A replica is asked for a sign of life so often within the silence after which it is given up.
TICKS = 5
# Of a message from a replica; a video's frames are the largest.
_MAX_MESSAGE_BYTES = 2 << 30

# Replicas that are remembered as gone until Ray has noticed too.
_MAX_UNABLE = 256

# Called with a replica's name and what its engine's turn tells.
TurnOf = Callable[[str, Turn], None]


class Holder(Protocol):
    """Who waits for the request of a ticket."""

    def claim(self, replica: str) -> Submit:
        """Return the request, for the replica that asks for it."""
        ...

    def accept(self) -> None:
        """Take note that the engine has taken it in."""
        ...

    def refuse(self, refusal: Refusal) -> None:
        """Take note that no engine can serve it."""
        ...

    def take(self, number: int, output: Output) -> None:
        """Take an output; number: how many came before it."""
        ...

    def lose(self, message: str, *, has_killed: bool) -> None:
        """Take note that it does not go on there."""
        ...


@dataclass(slots=True)
class _Replica:
    """One replica at the other end; quiet: ticks since it was heard."""

    name: str
    model: str
    quiet: int = 0
    is_able: bool = True
    tickets: dict[str, None] = field(default_factory=dict)


class Desk:
    """Listens for replicas. All methods belong to the event loop that made it.

    Connections are encrypted, and only who was told this desk's key through the cluster can make one.
    on_turn: by model, who wants to know of steps. page: what other fronts are told of this one.
    unable: replicas that were given up, or have no engine.
    """

    def __init__(self, host: str, *, silence_seconds: float) -> None:
        self.on_turn: dict[str, TurnOf] = {}
        self.page: Callable[[], str] = lambda: ""
        self.unable: dict[str, None] = {}
        self._tick_seconds = silence_seconds / TICKS
        self._codec = Codec()
        self._holders: dict[str, Holder] = {}
        self._claimed: dict[str, bytes] = {}
        self._replicas: dict[bytes, _Replica] = {}
        self._watched: set[str] = set()
        self._asked: dict[int, tuple[bytes, asyncio.Future[Answered]]] = {}
        self._tokens = itertools.count(1)
        self._context = Context()
        self._socket: Any = AsyncContext.shadow(self._context).socket(SocketType.ROUTER)
        public, secret = zmq.curve_keypair()
        self._socket.curve_server = True
        self._socket.curve_publickey = public
        self._socket.curve_secretkey = secret
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        try:
            port = self._socket.bind_to_random_port(f"tcp://{host}")
        except ZMQError as error:
            raise ConfigError(f"the front cannot listen on {host}: {error}") from error
        self.front = Front(f"tcp://{host}:{port}", public)
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._tick())]

    def open(self, ticket: str, holder: Holder) -> None:
        """Let a replica claim the request of a ticket."""
        self._holders[ticket] = holder

    def drop(self, ticket: str) -> None:
        """Want nothing of a ticket any more; whoever runs its request hears of it."""
        self._holders.pop(ticket, None)
        identity = self._claimed.pop(ticket, None)
        replica = None if identity is None else self._replicas.get(identity)
        if identity is not None and replica is not None:
            replica.tickets.pop(ticket, None)
            self._send(identity, Void(ticket=ticket))

    def replicas(self, model: str) -> list[str]:
        """Return the names of the replicas of a model that are heard and have an engine."""
        return [each.name for each in self._replicas.values() if each.model == model and each.is_able]

    def watch(self, model: str, *, is_on: bool) -> None:
        """Let the steps of a model's engines name their requests, or no longer."""
        if is_on:
            self._watched.add(model)
        else:
            self._watched.discard(model)
        for identity, replica in self._replicas.items():
            if replica.model == model:
                self._send(identity, Watching(is_on=is_on))

    async def ask(self, model: str, *, is_on: bool | None = None, num_steps: int | None = None) -> list[str]:
        """Ask every engine of a model whether it turns, or to record steps; return the files of recordings.

        Raises EngineDied where none is heard, ConfigError for what an engine refuses.
        """
        identities = [identity for identity, replica in self._replicas.items() if replica.model == model]
        if not identities:
            raise EngineDied(f"no replica of {model} is heard")
        answers = []
        for identity in identities:
            token = next(self._tokens)
            answer: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
            self._asked[token] = (identity, answer)
            answer.add_done_callback(lambda _, token=token: self._asked.pop(token, None))  # type: ignore[misc]
            answers.append(answer)
            self._send(identity, Asked(token=token, is_on=is_on, num_steps=num_steps))
        found = await asyncio.gather(*answers)
        for answered in found:
            if answered.problem is not None:
                raise ConfigError(answered.problem)
        return [answered.path for answered in found if answered.path is not None]

    async def close(self) -> None:
        """Listen no longer."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close(linger=0)
        self._context.term()

    async def _read(self) -> None:
        while True:
            identity, frame = await self._socket.recv_multipart()
            try:
                message = self._codec.from_replica(frame)
            except msgspec.MsgspecError as error:
                replica = self._replicas.get(identity)
                if replica is not None:
                    self._give_up(identity, replica, f"speaks another language: {error}")
                continue
            self._take(identity, message)

    def _take(self, identity: bytes, message: FromReplica) -> None:
        replica = self._replicas.get(identity)
        if replica is not None:
            replica.quiet = 0
        elif isinstance(message, Beat):
            self._replicas[identity] = _Replica(message.replica, message.model)
            self.unable.pop(message.replica, None)
            self._send(identity, Watching(is_on=message.model in self._watched))
        if replica is None:
            # What a replica says that was given up is nobody's.
            return
        match message:
            case Beat(is_able=False):
                replica.is_able = False
                self._disable(replica.name)
            case Claim(ticket=ticket):
                self._grant(identity, replica, ticket)
            case Told(turn=turn):
                on_turn = self.on_turn.get(replica.model)
                if on_turn is not None:
                    on_turn(replica.name, turn)
            case PageAsked(token=token):
                self._send(identity, Page(token=token, text=self.page()))
            case Answered(token=token):
                _, answer = self._asked.get(token, (b"", None))
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case Accepted() | Refused() | News() | Lost():
                if self._claimed.get(message.ticket) == identity:
                    self._tell(message)

    def _grant(self, identity: bytes, replica: _Replica, ticket: str) -> None:
        holder = self._holders.get(ticket)
        if holder is None or ticket in self._claimed:
            self._send(identity, Void(ticket=ticket))
            return
        self._claimed[ticket] = identity
        replica.tickets[ticket] = None
        self._send(identity, Grant(ticket=ticket, submission=holder.claim(replica.name)))

    def _tell(self, message: Accepted | Refused | News | Lost) -> None:
        holder = self._holders[message.ticket]
        match message:
            case Accepted():
                holder.accept()
            case Refused(refusal=refusal):
                holder.refuse(refusal)
            case News(number=number, output=output):
                holder.take(number, output)
            case Lost(message=text, has_killed=has_killed):
                holder.lose(text, has_killed=has_killed)

    async def _tick(self) -> None:
        """Send signs of life and count silence, in ticks: a pause of this loop is nobody's silence."""
        while True:
            await asyncio.sleep(self._tick_seconds)
            for identity, replica in list(self._replicas.items()):
                replica.quiet += 1
                if replica.quiet > TICKS:
                    self._give_up(identity, replica, "is silent")
                else:
                    self._send(identity, Beat())

    def _give_up(self, identity: bytes, replica: _Replica, reason: str) -> None:
        del self._replicas[identity]
        self._disable(replica.name)
        message = f"replica {replica.name} of {replica.model} {reason}"
        for ticket in replica.tickets:
            self._claimed.pop(ticket, None)
            holder = self._holders.pop(ticket, None)
            if holder is not None:
                holder.lose(message, has_killed=False)
        for asked, answer in list(self._asked.values()):
            if asked == identity and not answer.done():
                answer.set_exception(EngineDied(message))

    def _disable(self, name: str) -> None:
        self.unable[name] = None
        while len(self.unable) > _MAX_UNABLE:
            # The oldest one is long replaced.
            del self.unable[next(iter(self.unable))]

    def _send(self, identity: bytes, message: FromFront) -> None:
        # Queued without bound, at once; one that is not connected any more gets nothing.
        self._socket.send_multipart([identity, self._codec.encode(message)], Flag.DONTWAIT)
