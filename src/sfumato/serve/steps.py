"""/v1/engine/steps: what the engines' loops do, step by step, for whoever watches."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from sfumato.core.messages import Gauges, StepStats, Turn
from sfumato.serve.errors import unavailable
from sfumato.serve.registry import Registry, ServedModel
from sfumato.serve.streams import EventStream

router = APIRouter()

# Steps of small models take less than a millisecond; an eye is served by ten events a second.
_EVENT_SECONDS = 0.1
# Events come this often while nothing runs, so that a watcher knows that the line is open.
_QUIET_SECONDS = 1.0
# Of each watcher and model, what waits for the next event; the oldest steps give way.
_MAX_STEPS = 256


class Watcher:
    """The steps of one model that one watcher has not seen yet."""

    def __init__(self, on_close: Callable[[Watcher], None]) -> None:
        self._on_close = on_close
        self._steps: deque[StepStats] = deque(maxlen=_MAX_STEPS)
        self._num_dropped = 0

    def push(self, steps: tuple[StepStats, ...]) -> None:
        """Add steps."""
        for step in steps:
            self._num_dropped += len(self._steps) == _MAX_STEPS
            self._steps.append(step)

    def take(self) -> tuple[list[StepStats], int]:
        """Return what is new, and how many steps gave way."""
        steps, num_dropped = list(self._steps), self._num_dropped
        self._steps.clear()
        self._num_dropped = 0
        return steps, num_dropped

    def close(self) -> None:
        """Watch no longer."""
        self._on_close(self)


class StepFeed:
    """One model's steps; its engines name the requests of each step only while somebody watches."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.gauges: Gauges | None = None
        self._watchers: list[Watcher] = []

    def push(self, turn: Turn) -> None:
        """Take in a turn of one of the engines."""
        self.gauges = turn.gauges or self.gauges
        for watcher in self._watchers:
            watcher.push(turn.steps)

    def watch(self) -> Watcher:
        """Return a new watcher; whoever holds it must close it."""
        watcher = Watcher(self._leave)
        self._watchers.append(watcher)
        if len(self._watchers) == 1:
            self.model.client.watch(is_on=True)
        return watcher

    def _leave(self, watcher: Watcher) -> None:
        if watcher in self._watchers:
            self._watchers.remove(watcher)
            if not self._watchers:
                self.model.client.watch(is_on=False)


@router.get("/v1/engine/steps")
async def watch_steps(request: Request, model: str | None = None) -> Response:
    """Stream the steps of one model, or of all."""
    registry: Registry = request.app.state.registry
    if registry.is_draining:
        raise unavailable("the server is shutting down and takes no new requests")
    names = list(registry.models) if model is None else [registry.find(model).name]
    feeds = [request.app.state.step_feeds[name] for name in names]
    watchers = [feed.watch() for feed in feeds]

    def close() -> None:
        for watcher in watchers:
            watcher.close()

    return EventStream(_events(registry, feeds, watchers), close)


async def _events(
    registry: Registry, feeds: list[StepFeed], watchers: list[Watcher]
) -> AsyncIterator[dict[str, Any]]:
    """Yield what each model's engines did since its last event, until the server ends."""
    quiet = dict.fromkeys(watchers, 0.0)
    for feed in feeds:
        yield _event(feed, [], 0)
    while not registry.is_draining:
        for feed, watcher in zip(feeds, watchers, strict=True):
            steps, num_dropped = watcher.take()
            quiet[watcher] += _EVENT_SECONDS
            if steps or quiet[watcher] >= _QUIET_SECONDS:
                quiet[watcher] = 0.0
                yield _event(feed, steps, num_dropped)
        await asyncio.sleep(_EVENT_SECONDS)


def _event(feed: StepFeed, steps: list[StepStats], num_dropped: int) -> dict[str, Any]:
    return {
        "object": "engine.steps",
        "model": feed.model.name,
        "steps": steps,
        "num_dropped": num_dropped,
        "gauges": feed.gauges,
        "is_gone": feed.model.client.is_gone,
    }
