"""The parent's side of an engine process: starts it, talks to it from asyncio, notices when it is gone."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from zmq.asyncio import Context as AsyncContext
from zmq.constants import Flag, SocketType
from zmq.error import Again
from zmq.sugar.context import Context

from sfumato.config import EngineConfig
from sfumato.core.messages import (
    Abort,
    FinishReason,
    Output,
    Pause,
    Ping,
    Refusal,
    Resume,
    Stop,
    Submit,
    Turn,
    Watch,
)
from sfumato.engine.outputs import Outputs
from sfumato.engine.wire import (
    EngineInfo,
    Loading,
    PeersCommand,
    ProfileCommand,
    Profiled,
    StartFailure,
    ToEngine,
    address,
    decode_news,
    encode,
)
from sfumato.errors import ConfigError, EngineDied, EngineError, RequestError

# After the process is gone, what it sent last is still on its way through the socket for a moment.
_LAST_NEWS_SECONDS = 0.1
_KILL_SECONDS = 5.0
_NOBODYS_TOKEN = 0

LoadingCallback = Callable[[Loading], None]
TurnCallback = Callable[[Turn], None]
OutputCallback = Callable[[Output], None]


class EngineClient:
    """One engine process. All methods belong to the event loop that started it.

    on_turn: called with every turn that the engine sends; metrics hang there.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.on_turn: TurnCallback | None = None
        self._info: EngineInfo | None = None
        self._failure: str | None = None
        self._is_stopping = False
        self._takers: dict[str, OutputCallback] = {}
        # Aborted here, not yet ended there: a new request of that id would take the old end for its own.
        self._leaving: set[str] = set()
        self._answers: dict[str, asyncio.Future[None]] = {}
        # Who waits for a pong, or for the answer to a command.
        self._asked: dict[int, asyncio.Future[Profiled | None]] = {}
        self._tokens = itertools.count(1)
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[None] = self._loop.create_future()
        self._folder = tempfile.mkdtemp(prefix="sfumato-")
        self._context = Context()
        self._to_engine: Any = self._context.socket(SocketType.PUSH)
        self._from_engine: Any = AsyncContext.shadow(self._context).socket(SocketType.PULL)
        for socket in (self._to_engine, self._from_engine):
            socket.set_hwm(0)
        self._to_engine.bind(address(self._folder, "inbox"))
        self._from_engine.bind(address(self._folder, "outbox"))
        self._process = _spawn(config, self._folder)
        self._watch = threading.Thread(target=self._wait_for_exit, name="engine-watch", daemon=True)
        self._watch.start()
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, config: EngineConfig, on_loading: LoadingCallback | None = None) -> EngineClient:
        """Start an engine and wait until its model is loaded.

        Raises ConfigError with the engine's own words if it cannot start; EngineDied if it ends without any.
        """
        client = cls(config)
        try:
            await client._wait_until_ready(on_loading)
        except BaseException:
            await client.close()
            raise
        client._reader = asyncio.create_task(client._read())
        return client

    @property
    def info(self) -> EngineInfo:
        """Return what the engine said of itself when it was ready."""
        assert self._info is not None
        return self._info

    @property
    def pid(self) -> int:
        """Return the process id of the engine."""
        return self._process.pid

    @property
    def is_gone(self) -> bool:
        """Whether the engine process has ended, asked to or not."""
        return self._failure is not None

    @property
    def num_open(self) -> int:
        """Return how many requests have not ended."""
        return len(self._takers)

    async def _wait_until_ready(self, on_loading: LoadingCallback | None) -> None:
        while self._info is None:
            frame = await self._next_frame()
            if frame is None:
                status = self._process.poll()
                raise EngineDied(f"the engine of {self.config.model} ended while it loaded (status {status})")
            match decode_news(frame):
                case EngineInfo() as info:
                    self._info = info
                case Loading() as loading if on_loading is not None:
                    on_loading(loading)
                case StartFailure(message=message):
                    raise ConfigError(message)

    async def _next_frame(self) -> bytes | None:
        """Return the next frame from the engine, or None once it is gone and nothing is left."""
        receiving: asyncio.Future[bytes] = self._from_engine.recv()
        try:
            either: set[asyncio.Future[Any]] = {receiving, self._exited}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                await asyncio.wait({receiving}, timeout=_LAST_NEWS_SECONDS)
            return receiving.result() if receiving.done() else None
        finally:
            receiving.cancel()

    async def _read(self) -> None:
        """Hand out what the engine sends until it is gone; then end whatever is open."""
        try:
            while (frame := await self._next_frame()) is not None:
                match decode_news(frame):
                    case Turn() as turn:
                        self._take(turn)
                    case Profiled() as profiled:
                        self._tell(profiled.token, profiled)
        finally:
            # An engine that nobody listens to any more, for whatever reason, may not go on.
            if self._process.poll() is None:
                self._process.kill()
            self._fail_all()

    def _take(self, turn: Turn) -> None:
        for request_id in turn.accepted:
            self._answer(request_id, None)
        for refusal in turn.refusals:
            self._takers.pop(refusal.request_id, None)
            self._leaving.discard(refusal.request_id)
            self._answer(refusal.request_id, _as_error(refusal))
        for output in turn.outputs:
            if output.finish_reason is None:
                take = self._takers.get(output.request_id)
            else:
                take = self._takers.pop(output.request_id, None)
                self._leaving.discard(output.request_id)
            if take is not None:
                take(output)
        for token in turn.pongs:
            self._tell(token, None)
        if self.on_turn is not None:
            self.on_turn(turn)

    def _tell(self, token: int, answer: Profiled | None) -> None:
        """Answer who asked, if somebody still waits."""
        asked = self._asked.get(token)
        if asked is not None and not asked.done():
            asked.set_result(answer)

    def _answer(self, request_id: str, error: Exception | None) -> None:
        answer = self._answers.pop(request_id, None)
        if answer is None or answer.done():
            return
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(error)

    def _fail_all(self) -> None:
        """Answer everybody who waits for an engine that is gone."""
        if self._failure is None:
            status = self._process.poll()
            self._failure = f"the engine of {self.config.model} is gone (exit status {status})"
        for request_id in list(self._answers):
            # Whoever waits for its acceptance hears of it there.
            self._takers.pop(request_id, None)
            self._answer(request_id, EngineDied(self._failure))
        takers, self._takers = self._takers, {}
        for request_id, take in takers.items():
            take(Output(request_id=request_id, finish_reason=FinishReason.ERROR, error=self._failure))
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(EngineDied(self._failure))

    async def submit(self, submissions: Sequence[Submit]) -> Outputs:
        """Hand requests over and wait until the engine has accepted all of them; raises as `deliver` does."""
        group = Outputs(self.abort, [submission.request_id for submission in submissions])
        await self.deliver(submissions, group.put)
        return group

    async def deliver(self, submissions: Sequence[Submit], take: OutputCallback) -> None:
        """Hand requests over, their outputs to `take`, and wait until the engine has accepted all of them.

        Raises RequestError for the first that it refuses (the others are aborted), EngineError if it is
        shutting down, EngineDied if it is gone.
        """
        self._check_alive()
        for submission in submissions:
            if submission.request_id in self._takers or submission.request_id in self._leaving:
                message = f"request id {submission.request_id!r} is already active"
                raise RequestError(message, field="request_id", value=submission.request_id)
        answers = []
        for submission in submissions:
            answer: asyncio.Future[None] = self._loop.create_future()
            self._answers[submission.request_id] = answer
            self._takers[submission.request_id] = take
            answers.append(answer)
            self._send(submission)
        try:
            # All are waited for, so that no refusal stays unread.
            for outcome in await asyncio.gather(*answers, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
        except BaseException:
            for submission in submissions:
                self._answers.pop(submission.request_id, None)
                self.abort(submission.request_id)
            raise

    def abort(self, request_id: str) -> None:
        """End a request at the next step; its outputs are dropped from now on."""
        if self._takers.pop(request_id, None) is not None and self._failure is None:
            self._leaving.add(request_id)
            self._send(Abort(request_id=request_id))

    async def ping(self, *, timeout: float) -> None:
        """Wait until the loop has made a turn. Raises TimeoutError or EngineDied."""
        await asyncio.wait_for(self._ask(lambda token: Ping(token=token)), timeout)

    async def profile(self, *, is_on: bool, num_steps: int | None = None) -> str | None:
        """Begin to record steps, or end and return the file of what was recorded.

        Raises ConfigError where the engine cannot, EngineDied if it is gone.
        """
        profiled = await self._ask(
            lambda token: ProfileCommand(token=token, is_on=is_on, num_steps=num_steps)
        )
        if profiled is not None and profiled.problem is not None:
            raise ConfigError(profiled.problem)
        return None if profiled is None else profiled.path

    async def _ask(self, make: Callable[[int], ToEngine]) -> Profiled | None:
        """Send what carries a token and wait for what comes back with it."""
        self._check_alive()
        token = next(self._tokens)
        answer: asyncio.Future[Profiled | None] = self._loop.create_future()
        self._asked[token] = answer
        try:
            self._send(make(token))
            return await answer
        finally:
            self._asked.pop(token, None)

    def pause(self) -> None:
        """Keep every request and run nothing."""
        self._check_alive()
        self._send(Pause())

    def resume(self) -> None:
        """Run again after a pause."""
        self._check_alive()
        self._send(Resume())

    def watch(self, *, is_on: bool) -> None:
        """Let steps say which requests they ran, or no longer; a process that is gone says nothing anyway."""
        if self._failure is None:
            self._send(Watch(is_on=is_on))
            # Its answer brings the gauges of an engine that stands still; nobody waits for it.
            self._send(Ping(token=_NOBODYS_TOKEN))

    def meet(self, peers: Sequence[tuple[str, str]]) -> None:
        """Let the engine be helped by these from now on, and by no others: (address, shared secret) each."""
        self._check_alive()
        self._send(PeersCommand(peers=tuple(peers)))

    async def stop(self, *, drain: bool) -> None:
        """Let the engine finish its requests (drain) or end them now, and wait until its process is gone."""
        if self._failure is None and not self._exited.done():
            self._is_stopping = True
            self._send(Stop(drain=drain))
        await asyncio.wait({self._exited})
        if self._reader is not None:
            await asyncio.wait({self._reader})

    async def close(self) -> None:
        """Kill the process if it is still there and give everything back."""
        if self._process.poll() is None:
            self._process.kill()
        await asyncio.wait({self._exited}, timeout=_KILL_SECONDS)
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=_KILL_SECONDS)
            self._reader.cancel()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._to_engine.close(linger=0)
        self._from_engine.close(linger=0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDied(self._failure)
        if self._is_stopping:
            raise EngineError("the engine is shutting down and takes no new requests")

    def _send(self, message: ToEngine) -> None:
        try:
            self._to_engine.send(encode(message), Flag.DONTWAIT)
        except Again:
            # Nobody is at the other end; whoever waits is answered when the process's end is seen.
            return

    def _wait_for_exit(self) -> None:
        self._process.wait()
        try:
            self._loop.call_soon_threadsafe(self._exited.set_result, None)
        except RuntimeError:
            # The event loop closed first: nobody is left who waits.
            return


def _spawn(config: EngineConfig, folder: str) -> subprocess.Popen[bytes]:
    """Start the engine in a session of its own, so that Ctrl-C in the terminal reaches only the parent."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sfumato.engine.process", folder],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(config) + b"\n")
    process.stdin.flush()
    return process


def _as_error(refusal: Refusal) -> Exception:
    if not refusal.is_final:
        return EngineError(refusal.message)
    return RequestError(refusal.message, field=refusal.field or "request")
