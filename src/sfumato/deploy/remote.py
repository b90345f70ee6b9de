"""The front's side of one model's replicas: used as engines on this machine are."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from sfumato.core.messages import Gauges, Submit, Turn
from sfumato.core.spec import ImageSpec
from sfumato.core.traits import ModelTraits
from sfumato.deploy.desk import Desk
from sfumato.deploy.quarantine import Quarantine
from sfumato.deploy.running import Call, Patience, Running, Sending
from sfumato.deploy.ticket import Hints, Ticket
from sfumato.deploy.tracing import Tracer
from sfumato.engine.client import TurnCallback
from sfumato.engine.outputs import Outputs
from sfumato.engine.routing import chain_of, size_of
from sfumato.engine.wire import EngineInfo
from sfumato.errors import RequestError

_log = logging.getLogger("sfumato.deploy")


class RemoteEngines:
    """All replicas of one model. All methods belong to the event loop that made it.

    model: its name in the cluster. dispatch: sends a ticket through the router and lasts while it runs.
    """

    def __init__(
        self, info: EngineInfo, model: str, desk: Desk, dispatch: Callable[[Ticket], Call], patience: Patience
    ) -> None:
        self.info = info
        self.on_turn: TurnCallback | None = None
        # Ray replaces what is gone, and a request waits for that: to clients nothing is missing.
        self.num_gone = 0
        self.num_helpers_gone = 0
        self.num_retried = 0
        self._model = model
        self._desk = desk
        quarantine = Quarantine(lambda: len(desk.replicas(model)))
        self._sending = Sending(desk, Tracer(), dispatch, quarantine, patience)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._gauges: dict[str, Gauges] = {}
        desk.on_turn[model] = self._take_turn

    @property
    def clients(self) -> Sequence[object]:
        """Return the names of the replicas that are heard."""
        return self._desk.replicas(self._model)

    @property
    def is_gone(self) -> bool:
        """Whether no replica is heard."""
        return not self._desk.replicas(self._model)

    @property
    def num_open(self) -> int:
        """Return how many requests have not ended."""
        return len(self._tasks)

    async def submit(self, submissions: Sequence[Submit]) -> Outputs:
        """Send requests out and wait until all are accepted.

        Raises RequestError for the first that is refused (the others are aborted), EngineDied if no replica
        is found in time.
        """
        for submission in submissions:
            if submission.request_id in self._tasks:
                message = f"request id {submission.request_id!r} is already active"
                raise RequestError(message, field="request_id", value=submission.request_id)
        group = Outputs(self.abort, [submission.request_id for submission in submissions])
        runnings = [
            Running(submission, group.put, self._hint, self._sending, self._note_retry)
            for submission in submissions
        ]
        for submission, running in zip(submissions, runnings, strict=True):
            # Within the HTTP request: Ray Serve writes its own id of that beside ours.
            _log.info("request %s: came in", submission.request_id)
            # In a context of its own: calls of one HTTP request have one id, by which a router of Ray Serve's
            # finds only one of them.
            task = asyncio.create_task(
                running.drive(), name=submission.request_id, context=contextvars.Context()
            )
            self._tasks[submission.request_id] = task
            task.add_done_callback(lambda task: self._tasks.pop(task.get_name(), None))
        try:
            # All are waited for, so that no failure stays unread.
            for outcome in await asyncio.gather(
                *(running.accepted for running in runnings), return_exceptions=True
            ):
                if isinstance(outcome, BaseException):
                    raise outcome
        except BaseException:
            group.close()
            raise
        return group

    def abort(self, request_id: str) -> None:
        """End a request; its outputs are dropped from now on."""
        task = self._tasks.pop(request_id, None)
        if task is not None:
            task.cancel()

    async def ping(self, *, timeout: float) -> None:
        """Wait until the engine of every replica that is heard has made a turn.

        Raises TimeoutError, EngineDied or ConfigError.
        """
        await asyncio.wait_for(self._desk.ask(self._model), timeout)

    async def profile(self, *, is_on: bool, num_steps: int | None = None) -> list[str]:
        """Begin to record steps in every replica, or end and return the files, which lie on their nodes."""
        return await self._desk.ask(self._model, is_on=is_on, num_steps=num_steps)

    def watch(self, *, is_on: bool) -> None:
        """Let steps say which requests they ran, or no longer."""
        self._desk.watch(self._model, is_on=is_on)

    async def stop(self, *, drain: bool) -> None:
        """Let requests finish (drain) or end them now; the replicas are Ray's."""
        tasks = list(self._tasks.values())
        if not drain:
            for task in tasks:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """End what is open."""
        await self.stop(drain=False)

    def _hint(self, submission: Submit) -> Hints:
        return hints_of(submission, self.info)

    def _note_retry(self) -> None:
        self.num_retried += 1

    def _take_turn(self, replica: str, turn: Turn) -> None:
        """Pass a turn on; the gauges that are passed on are those of all replicas that are heard."""
        if turn.gauges is not None:
            self._gauges[replica] = turn.gauges
            heard = set(self._desk.replicas(self._model))
            self._gauges = {name: gauges for name, gauges in self._gauges.items() if name in heard}
            names = Gauges.__struct_fields__
            summed = {name: sum(getattr(each, name) for each in self._gauges.values()) for name in names}
            turn = replace(turn, gauges=Gauges(**summed))
        if self.on_turn is not None:
            self.on_turn(turn)


def hints_of(submission: Submit, info: EngineInfo) -> Hints:
    """Return what a router should know of a request."""
    spec = submission.spec
    ids, cost = size_of(spec)
    if isinstance(spec, ImageSpec):
        return Hints(cost=float(cost), group=f"{spec.height}x{spec.width}x{spec.num_frames}")
    has_cache = isinstance(info.traits, ModelTraits) and info.traits.has_exact_cache
    return Hints(cost=float(cost), num_prompt_tokens=len(ids), chain=chain_of(ids) if has_cache else ())
