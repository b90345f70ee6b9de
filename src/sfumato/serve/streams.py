"""Answers over HTTP that end the work behind them when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sfumato.errors import SfumatoError
from sfumato.serve.errors import ApiError, as_api_error

_Result = TypeVar("_Result")

# Nginx' number for a client that closed the connection; nobody reads it but a log.
CLIENT_GONE = 499

_encoder = msgspec.json.Encoder()


def json_response(content: object) -> Response:
    """Return a JSON response."""
    return Response(_encoder.encode(content), media_type="application/json")


class EventStream(StreamingResponse):
    """Server-sent events; on_close runs however it ends, even if the client left before it began.

    is_typed: each event is named by its field `type`, and nothing follows the last one, as OpenAI streams
    pictures.
    """

    def __init__(
        self,
        chunks: AsyncIterator[dict[str, Any]],
        on_close: Callable[[], None],
        *,
        is_typed: bool = False,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = _events(chunks, is_typed=is_typed)
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def _events(chunks: AsyncIterator[dict[str, Any]], *, is_typed: bool) -> AsyncIterator[bytes]:
    """Encode chunks as events; an error becomes the last event, and only a whole answer ends with [DONE]."""
    try:
        async for chunk in chunks:
            yield _event(chunk, name=chunk["type"] if is_typed else None)
    except (ApiError, SfumatoError) as error:
        yield _event(as_api_error(error).body(), name="error" if is_typed else None)
        return
    if not is_typed:
        yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any], *, name: str | None) -> bytes:
    named = b"" if name is None else f"event: {name}\n".encode()
    return named + b"data: " + _encoder.encode(content) + b"\n\n"


class ClientGone(Exception):
    """The client closed its connection before its answer was ready."""


async def until_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the result of work, or cancel it as soon as the client is gone. Raises ClientGone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
