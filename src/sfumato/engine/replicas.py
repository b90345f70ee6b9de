"""Independent engines of one model behind one name: each has its own process, requests and memory.

What a replica that is gone had begun is answered to its end by the others, behind what clients have of it
already; new requests go to those that are left.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from sfumato.config import EngineConfig
from sfumato.core.messages import FinishReason, Gauges, Output, Submit, Turn
from sfumato.core.traits import ModelTraits
from sfumato.engine.attempts import Attempts
from sfumato.engine.client import EngineClient, LoadingCallback, TurnCallback
from sfumato.engine.outputs import Outputs
from sfumato.engine.quarantine import Quarantine
from sfumato.engine.routing import Router, size_of
from sfumato.engine.wire import EngineInfo
from sfumato.errors import EngineDied, RequestError


@dataclass(slots=True)
class _Open:
    """A request that has not ended, and where its outputs go; index: the engine that had it last."""

    attempts: Attempts
    group: Outputs
    index: int | None = None


class Replicas:
    """One or more engine clients that are used as one. All methods belong to the loop that started it.

    helpers: engines that work for these, take no request themselves, and end with them. One that is gone is
    not missed. num_retried: how often a request has lost its engine and was given to another.
    """

    def __init__(self, clients: Sequence[EngineClient], helpers: Sequence[EngineClient] = ()) -> None:
        self.clients = list(clients)
        self.helpers = list(helpers)
        self.on_turn: TurnCallback | None = None
        self.num_retried = 0
        self._router = Router(len(clients), shares_prefixes=_shares_prefixes(clients[0].info))
        self._open: dict[str, _Open] = {}
        self._gauges: dict[int, Gauges] = {}
        self._moving: set[asyncio.Task[None]] = set()
        self._quarantine = Quarantine()
        for index, client in enumerate(self.clients):
            client.on_turn = self._turn_of(index)
        for helper in self.helpers:
            helper.on_turn = self._take_help

    @classmethod
    async def start(
        cls,
        configs: Sequence[EngineConfig],
        on_loading: LoadingCallback | None = None,
        *,
        helpers: Sequence[EngineClient] = (),
    ) -> Replicas:
        """Start one engine each at the same time; if one fails, the others are ended.

        Raises ConfigError or EngineDied.
        """
        tasks = [asyncio.create_task(EngineClient.start(config, on_loading)) for config in configs]
        try:
            return cls(await asyncio.gather(*tasks), helpers)
        except BaseException:
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, EngineClient):
                    await outcome.close()
            raise

    @property
    def info(self) -> EngineInfo:
        """Return what the engines said of themselves; they are all alike."""
        return self.clients[0].info

    @property
    def is_gone(self) -> bool:
        """Whether no engine is left."""
        return all(client.is_gone for client in self.clients)

    @property
    def num_gone(self) -> int:
        """Return how many engines have ended."""
        return sum(client.is_gone for client in self.clients)

    @property
    def num_helpers_gone(self) -> int:
        """Return how many helpers have ended."""
        return sum(helper.is_gone for helper in self.helpers)

    @property
    def num_open(self) -> int:
        """Return how many requests have not ended."""
        return sum(client.num_open for client in self.clients)

    async def submit(self, submissions: Sequence[Submit]) -> Outputs:
        """Hand requests over, each to the replica that suits it, and wait until all are accepted.

        Raises as `EngineClient.submit` does.
        """
        for submission in submissions:
            if submission.request_id in self._open:
                # Another replica would not know of it.
                message = f"request id {submission.request_id!r} is already active"
                raise RequestError(message, field="request_id", value=submission.request_id)
        group = Outputs(self.abort, [submission.request_id for submission in submissions])
        opened = [_Open(Attempts(submission), group) for submission in submissions]
        self._open.update((found.attempts.submission.request_id, found) for found in opened)
        outcomes = await asyncio.gather(*(self._place(found) for found in opened), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failures:
            group.close()
            raise failures[0]
        return group

    async def _place(self, found: _Open) -> None:
        """Hand a request to an engine, and to another as long as one ends before it has accepted it.

        Raises as `EngineClient.deliver` does, and as `Attempts.again`.
        """
        request_id = found.attempts.submission.request_id
        try:
            while self._open.get(request_id) is found:
                found.attempts.check()
                await self._wait_apart(found)
                submission = found.attempts.again()
                found.index = self._route(found, submission)
                client = self.clients[found.index]
                if client.is_gone:
                    self._router.end(request_id)
                    self._router.lose(found.index)
                    continue
                try:
                    return await client.deliver([submission], self._take)
                except EngineDied:
                    self._lose(found, found.index)
                    if self.is_gone:
                        raise
        except BaseException:
            if self._open.get(request_id) is found:
                self._forget(request_id)
            raise

    async def _wait_apart(self, found: _Open) -> None:
        """Wait, with a suspect, for an engine without one, or for its deadline."""
        attempts = found.attempts
        if not attempts.is_suspect:
            return

        def may_enter() -> bool:
            alive = {index for index, client in enumerate(self.clients) if not client.is_gone}
            is_wanted = self._open.get(attempts.submission.request_id) is found
            return not is_wanted or not alive or bool(alive.difference(self._quarantine.taken))

        # A deadline that passes meanwhile is named by `Attempts.again`.
        with contextlib.suppress(TimeoutError):
            await self._quarantine.wait(may_enter, attempts.seconds_left)

    def _route(self, found: _Open, submission: Submit) -> int:
        """Return the engine that a request goes to. Raises EngineDied."""
        prompt_ids, expected = size_of(submission.spec)
        barred = self._quarantine.taken if found.attempts.is_suspect else ()
        try:
            index = self._router.choose(submission.request_id, prompt_ids, expected, barred=barred)
        except LookupError:
            raise EngineDied(f"every engine of {self.clients[0].config.model} is gone") from None
        if found.attempts.is_suspect:
            self._quarantine.enter(submission.request_id, index)
        return index

    def _take(self, output: Output) -> None:
        found = self._open.get(output.request_id)
        if found is None:
            return
        assert found.index is not None
        is_lost = output.finish_reason is FinishReason.ERROR and self.clients[found.index].is_gone
        if is_lost and not self.is_gone:
            self._lose(found, found.index)
            task = asyncio.create_task(self._move(found))
            self._moving.add(task)
            task.add_done_callback(self._moving.discard)
            return
        fresh = found.attempts.take(output)
        if not found.attempts.is_suspect:
            self._quarantine.leave(output.request_id)
        if output.finish_reason is not None:
            self._forget(output.request_id)
        if fresh is not None:
            found.group.put(fresh)

    def _lose(self, found: _Open, index: int) -> None:
        """Take note that the engine that had a request is gone."""
        request_id = found.attempts.submission.request_id
        found.attempts.lose()
        self.num_retried += 1
        self._router.lose(index)
        self._router.end(request_id)
        self._quarantine.leave(request_id)
        self._quarantine.look()

    async def _move(self, found: _Open) -> None:
        """Let another engine go on with a request, after the one that had it is gone."""
        try:
            await self._place(found)
        except Exception as error:  # whatever stands in the way ends this request, and nothing else
            found.group.put(found.attempts.failed(error))

    def _forget(self, request_id: str) -> None:
        self._router.end(request_id)
        self._open.pop(request_id, None)
        self._quarantine.leave(request_id)
        self._quarantine.look()

    def abort(self, request_id: str) -> None:
        """End a request at the next step; its outputs are dropped from now on."""
        found = self._open.get(request_id)
        if found is not None:
            self._forget(request_id)
            if found.index is not None:
                self.clients[found.index].abort(request_id)

    async def ping(self, *, timeout: float) -> None:
        """Wait until the loop of every engine that is left has made a turn.

        Raises TimeoutError, or EngineDied if none is left.
        """
        alive = [client for client in self.clients if not client.is_gone] or self.clients[:1]
        await asyncio.gather(*(client.ping(timeout=timeout) for client in alive))

    async def profile(self, *, is_on: bool, num_steps: int | None = None) -> list[str]:
        """Begin to record steps in every engine that is left, helpers too, or end and return the files.

        Raises as `EngineClient.profile` does.
        """
        alive = [client for client in (*self.clients, *self.helpers) if not client.is_gone]
        found = await asyncio.gather(*(each.profile(is_on=is_on, num_steps=num_steps) for each in alive))
        return [path for path in found if path is not None]

    def watch(self, *, is_on: bool) -> None:
        """Let steps of all engines, helpers too, say which requests they ran, or no longer."""
        for client in (*self.clients, *self.helpers):
            client.watch(is_on=is_on)

    async def stop(self, *, drain: bool) -> None:
        """Let the engines finish their requests (drain) or end them now; wait until they are gone."""
        await asyncio.gather(*(client.stop(drain=drain) for client in self.clients))
        await asyncio.gather(*(helper.stop(drain=False) for helper in self.helpers))

    async def close(self) -> None:
        """Kill the processes that are still there and give everything back."""
        for task in self._moving:
            task.cancel()
        await asyncio.gather(*(client.close() for client in (*self.clients, *self.helpers)))

    def _take_help(self, turn: Turn) -> None:
        """Pass on what a helper ran; what it holds is not these engines'."""
        if self.on_turn is not None:
            self.on_turn(replace(turn, gauges=None))

    def _turn_of(self, index: int) -> TurnCallback:
        """Return what takes the turns of one replica: the gauges that are passed on are those of all."""

        def take(turn: Turn) -> None:
            if turn.gauges is not None:
                self._gauges[index] = turn.gauges
                turn = replace(turn, gauges=self._summed())
            if self.on_turn is not None:
                self.on_turn(turn)

        return take

    def _summed(self) -> Gauges:
        alive = [gauges for index, gauges in self._gauges.items() if not self.clients[index].is_gone]
        names = Gauges.__struct_fields__
        return Gauges(**{name: sum(getattr(gauges, name) for gauges in alive) for name in names})


def _shares_prefixes(info: EngineInfo) -> bool:
    """Whether requests with the same beginning cost less on the same engine."""
    return isinstance(info.traits, ModelTraits) and info.traits.has_exact_cache
