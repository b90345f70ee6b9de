"""What chat and plain completions begin with: a parsed body becomes a call with its model and its seed."""

from __future__ import annotations

import secrets
import time

from fastapi import Request

from sfumato.engine.frontend import draw_seed
from sfumato.serve.errors import unavailable
from sfumato.serve.generation import Call
from sfumato.serve.registry import Registry
from sfumato.serve.schema import ChatRequest, CompletionRequest


def open_call(request: Request, body: ChatRequest | CompletionRequest, *, prefix: str) -> Call:
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
