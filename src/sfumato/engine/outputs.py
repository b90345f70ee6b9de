"""What comes back of requests that were submitted together; knows no socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Self

from sfumato.core.messages import Output


class Outputs:
    """The outputs of requests that were submitted together, until each of them has ended."""

    def __init__(self, abort: Callable[[str], None], request_ids: Sequence[str]) -> None:
        self._abort = abort
        self._open = dict.fromkeys(request_ids)
        self._queue: asyncio.Queue[Output] = asyncio.Queue()

    def put(self, output: Output) -> None:
        """Add what the engine sent."""
        self._queue.put_nowait(output)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        while self._open:
            output = await self._queue.get()
            if output.request_id not in self._open:
                continue
            if output.finish_reason is not None:
                del self._open[output.request_id]
            return output
        raise StopAsyncIteration

    def abort(self, request_id: str) -> None:
        """End one request; nothing more comes from it."""
        if request_id in self._open:
            del self._open[request_id]
            self._abort(request_id)

    def close(self) -> None:
        """Abort whatever has not ended."""
        for request_id in list(self._open):
            self.abort(request_id)
