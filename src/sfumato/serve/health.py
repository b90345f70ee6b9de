"""/health: whether every engine makes turns, asked of the engines themselves."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from sfumato.errors import EngineError
from sfumato.serve.errors import unavailable
from sfumato.serve.registry import Registry, ServedModel
from sfumato.serve.settings import ServerSettings
from sfumato.serve.streams import json_response

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """Answer 200 once every engine has made a turn of its loop; 503 names those that have not."""
    registry: Registry = request.app.state.registry
    settings: ServerSettings = request.app.state.settings
    if registry.is_draining:
        raise unavailable("the server is shutting down")
    problems = await asyncio.gather(
        *(_problem(model, settings.health_timeout) for model in registry.models.values())
    )
    found = [problem for problem in problems if problem is not None]
    if found:
        raise unavailable("; ".join(found))
    gone = {
        model.name: model.client.num_gone + model.client.num_helpers_gone
        for model in registry.models.values()
    }
    gone = {name: count for name, count in gone.items() if count}
    if gone:
        # What is left answers; an operator should know all the same.
        return json_response({"status": "degraded", "models": list(registry.models), "engines_gone": gone})
    return json_response({"status": "ok", "models": list(registry.models)})


async def _problem(model: ServedModel, timeout: float) -> str | None:
    """Return what is wrong with a model's engine, or None."""
    try:
        await model.client.ping(timeout=timeout)
    except TimeoutError:
        return f"model {model.name!r}: no step within {timeout:g} seconds"
    except EngineError as error:
        return f"model {model.name!r}: {error}"
    return None
