"""API keys: who may use the server."""

from __future__ import annotations

import hmac

from fastapi import Request

from sfumato.serve.errors import ApiError
from sfumato.serve.settings import ServerSettings


async def check_key(request: Request) -> None:
    """Refuse a request without one of the server's keys. Raises ApiError 401."""
    settings: ServerSettings = request.app.state.settings
    if not settings.api_keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Every key is compared to its end, so that the time taken tells nothing.
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in settings.api_keys]
    if scheme.lower() == "bearer" and any(matches):
        return
    message = "Incorrect API key provided" if given else "No API key provided; send Authorization: Bearer KEY"
    raise ApiError(401, message, kind="invalid_request_error", code="invalid_api_key")
