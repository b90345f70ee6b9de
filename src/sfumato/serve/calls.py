"""What chat and plain completions share: a parsed body becomes a call, and a call becomes an answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from sfumato.engine.frontend import draw_seed
from sfumato.serve.errors import unavailable
from sfumato.serve.generation import Call, Collected, Generation, collect
from sfumato.serve.infill_schema import InfillRequest
from sfumato.serve.registry import Registry
from sfumato.serve.schema import ChatRequest, CompletionRequest
from sfumato.serve.streams import CLIENT_GONE, ClientGone, EventStream, json_response, until_gone


def open_call(
    request: Request, body: ChatRequest | CompletionRequest | InfillRequest, *, prefix: str
) -> Call:
    """Find the model and draw a seed where none is given. Raises ApiError."""
    registry: Registry = request.app.state.registry
    if registry.is_draining:
        raise unavailable("the server is shutting down and takes no new requests")
    model = registry.find(body.model)
    seed = draw_seed() if body.seed is None else body.seed
    return Call(
        id=f"{prefix}-{secrets.token_hex(12)}",
        endpoint=request.url.path,
        model=model,
        params=body.params(seed),
        created=int(time.time()),
    )


async def respond(
    request: Request,
    starting: Coroutine[Any, Any, Generation],
    *,
    chunks: Callable[[Generation], AsyncIterator[dict[str, Any]]] | None,
    whole: Callable[[Generation, list[Collected]], dict[str, Any]],
) -> Response:
    """Start a call and answer it, by `chunks` as events or at once by `whole`; a client that left ends it."""
    try:
        if chunks is not None:
            generation = await until_gone(request, starting)
            return EventStream(chunks(generation), generation.close)
        return json_response(await until_gone(request, _collected(starting, whole)))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)


async def _collected(
    starting: Coroutine[Any, Any, Generation],
    whole: Callable[[Generation, list[Collected]], dict[str, Any]],
) -> dict[str, Any]:
    generation = await starting
    try:
        finished = await collect(generation)
    finally:
        generation.close()
    return whole(generation, finished)
