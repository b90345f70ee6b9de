"""Independent engines of one model behind one name: each has its own process, requests and memory.

A replica that is gone takes what it had begun to answer with it; what had not output a token yet is answered
by another one, and new requests go to those that are left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from sfumato.config import EngineConfig
from sfumato.core.messages import FinishReason, Gauges, Output, Submit, Turn
from sfumato.core.spec import ImageSpec, ScoreSpec, TextSpec
from sfumato.core.traits import ModelTraits
from sfumato.engine.client import EngineClient, LoadingCallback, Outputs, TurnCallback
from sfumato.engine.routing import Router
from sfumato.engine.wire import EngineInfo
from sfumato.errors import EngineDied, RequestError


@dataclass(slots=True)
class _Open:
    """A request that has not ended, and the outputs that it reports to."""

    submission: Submit
    group: Outputs
    index: int
    has_begun: bool = False


class Replicas:
    """One or more engine clients that are used as one. All methods belong to the loop that started it.

    helpers: engines that work for these, take no request themselves, and end with them. One that is gone is
    not missed.
    """

    def __init__(self, clients: Sequence[EngineClient], helpers: Sequence[EngineClient] = ()) -> None:
        self.clients = list(clients)
        self.helpers = list(helpers)
        self.on_turn: TurnCallback | None = None
        self._router = Router(len(clients), shares_prefixes=_shares_prefixes(clients[0].info))
        self._open: dict[str, _Open] = {}
        self._gauges: dict[int, Gauges] = {}
        self._moving: set[asyncio.Task[None]] = set()
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
        outcomes = await asyncio.gather(*self._deliveries(submissions, group), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failures:
            group.close()
            raise failures[0]
        return group

    def _deliveries(
        self, submissions: Sequence[Submit], group: Outputs
    ) -> Iterator[Coroutine[None, None, None]]:
        """Route requests; yield what hands them over, once for each replica that takes some."""
        by_client: dict[int, list[Submit]] = {}
        for submission in submissions:
            by_client.setdefault(self._route(submission, group), []).append(submission)
        for index, some in by_client.items():
            yield self._deliver(index, some, group)

    async def _deliver(self, index: int, submissions: Sequence[Submit], group: Outputs) -> None:
        """Hand requests over to a replica, or to the others where it turns out to be gone."""
        try:
            await self.clients[index].deliver(submissions, self._take)
        except EngineDied:
            for submission in submissions:
                self._forget(submission.request_id)
            self._router.lose(index)
            if self.is_gone:
                raise
            await asyncio.gather(*self._deliveries(submissions, group))
        except BaseException:
            for submission in submissions:
                self._forget(submission.request_id)
            raise

    def _route(self, submission: Submit, group: Outputs) -> int:
        spec = submission.spec
        prompt_ids: tuple[int, ...] = ()
        match spec:
            case ScoreSpec():
                prompt_ids, expected = spec.prompt_ids, len(spec.target_ids)
            case TextSpec():
                prompt_ids, expected = spec.prompt_ids, spec.max_tokens
            case ImageSpec():
                # No two images share a prefix; what they cost goes by their steps.
                expected = spec.num_inference_steps * spec.num_images
        try:
            index = self._router.choose(submission.request_id, prompt_ids, expected)
        except LookupError:
            raise EngineDied(f"every engine of {self.clients[0].config.model} is gone") from None
        self._open[submission.request_id] = _Open(submission, group, index)
        return index

    def _take(self, output: Output) -> None:
        found = self._open.get(output.request_id)
        if found is None:
            return
        client = self.clients[found.index]
        is_lost = output.finish_reason is FinishReason.ERROR and client.is_gone
        if is_lost:
            self._router.lose(found.index)
            if not found.has_begun and self.num_gone < len(self.clients):
                task = asyncio.create_task(self._move(found))
                self._moving.add(task)
                task.add_done_callback(self._moving.discard)
                return
        found.has_begun = found.has_begun or bool(output.token_ids)
        if output.finish_reason is not None:
            self._forget(output.request_id)
        found.group.put(output)

    async def _move(self, found: _Open) -> None:
        """Submit a request once more, after the engine that had it is gone."""
        submission = found.submission
        if self._open.get(submission.request_id) is not found:
            # It was aborted meanwhile.
            return
        self._router.end(submission.request_id)
        try:
            index = self._route(submission, found.group)
            await self._deliver(index, [submission], found.group)
        except Exception as error:  # whatever stands in the way ends this request, and nothing else
            self._forget(submission.request_id)
            message = str(error)
            found.group.put(
                Output(request_id=submission.request_id, finish_reason=FinishReason.ERROR, error=message)
            )

    def _forget(self, request_id: str) -> None:
        self._router.end(request_id)
        self._open.pop(request_id, None)

    def abort(self, request_id: str) -> None:
        """End a request at the next step; its outputs are dropped from now on."""
        found = self._open.get(request_id)
        if found is not None:
            self._forget(request_id)
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
