"""What a replica does with one engine: runs the requests of tickets, watches that the engine turns."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

from msgspec.structs import replace

from sfumato.core.messages import FinishReason, Gauges, Output, Refusal, StepStats, Submit, Turn
from sfumato.deploy.links import Link, Links
from sfumato.deploy.ticket import Front, Ticket
from sfumato.deploy.tracing import Tracer
from sfumato.deploy.wire import Accepted, Answered, Asked, Lost, News, Refused, Told
from sfumato.engine.client import EngineClient
from sfumato.errors import EngineDied, EngineError, RequestError, SfumatoError

# What turns tell is sent together: steps of small models take less than a millisecond.
_TELL_SECONDS = 0.25
# Of what waits to be told; a front that falls behind misses steps, not tokens.
_MAX_STEPS = 4096
# So soon fronts hear that an engine is gone.
_WATCH_SECONDS = 0.1

_log = logging.getLogger("sfumato.deploy")


@dataclass(slots=True)
class _Run:
    """One request on the engine, and the front that waits for it."""

    ticket: str
    link: Link
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    num_sent: int = 0


class Worker:
    """One engine and the fronts that it works for. All methods belong to the event loop that made it.

    stall_seconds: an engine whose loop makes no turn for so long while it is asked to is ended.
    """

    def __init__(
        self, engine: EngineClient, replica: str, model: str, *, silence_seconds: float, stall_seconds: float
    ) -> None:
        self.engine = engine
        self.gauges = Gauges(
            waiting=0, running=0, pages_free=0, pages_leased=0, pages_cached=0, retractions=0
        )
        self.step_seconds = 0.0
        self._replica = replica
        self._stall_seconds = stall_seconds
        self._steps: list[StepStats] = []
        self._is_gauged = False
        self._links = Links(
            replica,
            model,
            silence_seconds=silence_seconds,
            on_watch=lambda is_on: engine.watch(is_on=is_on),
            on_asked=self._note_asked,
        )
        self._tracer = Tracer()
        self._answering: set[asyncio.Task[None]] = set()
        engine.on_turn = self._take_turn
        self._tasks = [asyncio.create_task(self._tell()), asyncio.create_task(self._watch_engine())]

    def meet(self, fronts: list[Front]) -> None:
        """Connect to fronts that are not known yet; those that are gone fall silent by themselves."""
        for front in fronts:
            self._links.to(front)

    async def run(self, ticket: Ticket) -> None:
        """Run the request of a ticket to its end; what becomes of it is told to the front that has it."""
        link = self._links.to(ticket.front)
        request_id = ""
        run = _Run(ticket.id, link)

        def void() -> None:
            self.engine.abort(request_id)
            run.ended.set()

        try:
            submission = await link.claim(ticket.id, void)
            if submission is None:
                return
            request_id = submission.request_id
            _log.info("request %s: begins on replica %s", request_id, self._replica)
            with self._tracer.span("run", request_id, ticket.trace):
                await self._submit(run, submission)
                await run.ended.wait()
            _log.info("request %s: ended on replica %s", request_id, self._replica)
        except BaseException:
            self.engine.abort(request_id)
            raise
        finally:
            link.leave(ticket.id)

    async def _submit(self, run: _Run, submission: Submit) -> None:
        """Hand a request to the engine and say what came of it."""
        was_gone = self.engine.is_gone

        def take(output: Output) -> None:
            self._pass_on(run, output)

        try:
            await self.engine.deliver([submission], take)
            run.link.send(Accepted(ticket=run.ticket))
        except RequestError as error:
            refusal = Refusal(request_id=submission.request_id, message=str(error), field=error.field)
            self._end(run, Refused(ticket=run.ticket, refusal=refusal))
        except EngineDied as error:
            self._end(run, Lost(ticket=run.ticket, message=str(error), has_killed=not was_gone))
        except EngineError as error:
            self._end(run, Lost(ticket=run.ticket, message=str(error), has_killed=False))

    def _pass_on(self, run: _Run, output: Output) -> None:
        if output.finish_reason is FinishReason.ERROR and self.engine.is_gone:
            self._links.disable()
            self._end(run, Lost(ticket=run.ticket, message=output.error or "", has_killed=True))
            return
        if output.finish_reason is FinishReason.ABORT:
            # Nobody but a shutdown ends a request that its front still wants.
            self._end(run, Lost(ticket=run.ticket, message="the engine was shut down", has_killed=False))
            return
        news = News(ticket=run.ticket, number=run.num_sent, output=output)
        run.num_sent += 1
        if output.finish_reason is None:
            run.link.send(news)
        else:
            self._end(run, news)

    def _end(self, run: _Run, last: News | Lost | Refused) -> None:
        run.link.send(last)
        run.ended.set()

    def check(self) -> None:
        """Raise EngineDied if the engine is gone, so that the replica is replaced."""
        if self.engine.is_gone:
            raise EngineDied(f"the engine of replica {self._replica} is gone")

    async def close(self) -> None:
        """End the engine and all links."""
        for task in (*self._tasks, *self._answering):
            task.cancel()
        await self.engine.close()
        await self._links.close()

    def _take_turn(self, turn: Turn) -> None:
        if turn.gauges is not None:
            self.gauges, self._is_gauged = turn.gauges, True
        for step in turn.steps:
            seconds = step.host_seconds + step.device_seconds
            # About the last thirty steps.
            self.step_seconds += (seconds - self.step_seconds) / 30
        self._steps += turn.steps[: _MAX_STEPS - len(self._steps)]

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(_TELL_SECONDS)
            if not self._steps and not self._is_gauged:
                continue
            turn = Turn(steps=tuple(self._steps), gauges=self.gauges)
            self._steps, self._is_gauged = [], False
            self._links.tell(Told(turn=turn))

    async def _watch_engine(self) -> None:
        """End an engine that stands still; tell when it is gone, however that came."""
        while not self.engine.is_gone:
            try:
                await self.engine.ping(timeout=self._stall_seconds)
            except TimeoutError:
                _log.error("the engine of %s made no turn for %g s", self._replica, self._stall_seconds)
                await self.engine.close()
            except EngineError:
                break
            end = time.monotonic() + self._stall_seconds / 4
            while not self.engine.is_gone and time.monotonic() < end:
                await asyncio.sleep(_WATCH_SECONDS)
        self._links.disable()

    def _note_asked(self, link: Link, asked: Asked) -> None:
        task = asyncio.create_task(self._answer(link, asked))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, link: Link, asked: Asked) -> None:
        answer = Answered(token=asked.token)
        try:
            if asked.is_on is None:
                await self.engine.ping(timeout=self._stall_seconds)
            else:
                path = await self.engine.profile(is_on=asked.is_on, num_steps=asked.num_steps)
                answer = replace(answer, path=path)
        except (SfumatoError, TimeoutError) as error:
            answer = replace(answer, problem=str(error) or "no turn in time")
        link.send(answer)
