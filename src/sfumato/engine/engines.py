"""One or more engines of one model as the front door sees them, wherever they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sfumato.core.messages import Submit
from sfumato.engine.client import TurnCallback
from sfumato.engine.outputs import Outputs
from sfumato.engine.wire import EngineInfo


class Engines(Protocol):
    """Engines of one model behind one name; on_turn: called with what each of their turns tells of steps."""

    on_turn: TurnCallback | None

    @property
    def info(self) -> EngineInfo:
        """Return what the engines said of themselves; they are all alike."""
        ...

    @property
    def clients(self) -> Sequence[object]:
        """Return the engines that take requests, one object each."""
        ...

    @property
    def is_gone(self) -> bool:
        """Whether no engine is left."""
        ...

    @property
    def num_gone(self) -> int:
        """Return how many engines have ended."""
        ...

    @property
    def num_helpers_gone(self) -> int:
        """Return how many engines that work for these have ended."""
        ...

    @property
    def num_retried(self) -> int:
        """Return how often a request has lost its engine and was given to another."""
        ...

    @property
    def num_open(self) -> int:
        """Return how many requests have not ended."""
        ...

    async def submit(self, submissions: Sequence[Submit]) -> Outputs:
        """Hand requests over and wait until all are accepted. Raises RequestError or EngineError."""
        ...

    async def ping(self, *, timeout: float) -> None:
        """Wait until the engines' loops have made a turn. Raises TimeoutError or EngineDied."""
        ...

    async def profile(self, *, is_on: bool, num_steps: int | None = None) -> list[str]:
        """Begin to record steps, or end and return the files. Raises ConfigError or EngineDied."""
        ...

    def watch(self, *, is_on: bool) -> None:
        """Let steps say which requests they ran, or no longer."""
        ...

    async def stop(self, *, drain: bool) -> None:
        """Let requests finish (drain) or end them now."""
        ...

    async def close(self) -> None:
        """Give everything back."""
        ...
