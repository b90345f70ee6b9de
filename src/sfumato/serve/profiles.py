"""/start_profile and /stop_profile: traces of the engines' steps, where the operator has named a folder."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from sfumato.errors import ConfigError
from sfumato.serve.errors import ApiError
from sfumato.serve.registry import Registry, ServedModel
from sfumato.serve.streams import json_response

router = APIRouter()


class ProfileRequest(BaseModel):
    """model: one of the served; without it all of them. num_steps: without it until /stop_profile."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    num_steps: Annotated[int, Field(ge=1, strict=True)] | None = None


@router.post("/start_profile")
async def start(request: Request, body: ProfileRequest | None = None) -> Response:
    """Begin to record the engines' steps."""
    asked = body or ProfileRequest()
    await _command(request, asked.model, is_on=True, num_steps=asked.num_steps)
    return json_response({"status": "recording"})


@router.post("/stop_profile")
async def stop(request: Request, body: ProfileRequest | None = None) -> Response:
    """End the recordings and name their files; none where they have ended by themselves."""
    asked = body or ProfileRequest()
    return json_response({"status": "stopped", "files": await _command(request, asked.model, is_on=False)})


async def _command(request: Request, name: str | None, **fields: Any) -> list[str]:
    registry: Registry = request.app.state.registry
    models: list[ServedModel] = list(registry.models.values()) if name is None else [registry.find(name)]
    try:
        found = await asyncio.gather(*(model.client.profile(**fields) for model in models))
    except ConfigError as error:
        # Something is being recorded already, or the disk is full: the state, not the request.
        raise ApiError(409, str(error), kind="invalid_request_error", code="profile_conflict") from error
    return [path for paths in found for path in paths]
