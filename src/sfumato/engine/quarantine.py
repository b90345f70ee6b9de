"""Where suspects run: one on an engine at a time, so that an engine that ends tells which of them did it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection


class Quarantine:
    """Which engines have a suspect. All methods belong to one event loop."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._changed = asyncio.Event()

    @property
    def taken(self) -> Collection[int]:
        """Return the engines that have a suspect."""
        return self._places.values()

    def enter(self, request_id: str, index: int) -> None:
        """Take note that a suspect runs on an engine that has none."""
        assert index not in self.taken
        self._places[request_id] = index

    def leave(self, request_id: str) -> None:
        """Take note that a request has ended, is no suspect any more, or has lost its engine."""
        if self._places.pop(request_id, None) is not None:
            self.look()

    def look(self) -> None:
        """Let those that wait look again: an engine is gone, or one of them is not wanted any more."""
        self._changed.set()

    async def wait(self, may_enter: Callable[[], bool], timeout: float | None) -> None:
        """Return once `may_enter` says so. Raises TimeoutError after `timeout` seconds."""
        async with asyncio.timeout(timeout):
            while not may_enter():
                self._changed.clear()
                await self._changed.wait()
