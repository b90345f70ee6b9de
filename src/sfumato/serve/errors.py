"""Errors in OpenAI's form: what goes over the wire, and which status an exception of ours gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sfumato.errors import ConfigError, EngineError, RequestError


class ApiError(Exception):
    """One error as a client sees it."""

    def __init__(
        self, status: int, message: str, *, kind: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        headers = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 503:
            headers["Retry-After"] = "1"
        if self.code == "timeout":
            # The official client would otherwise repeat a request that the caller gave so many seconds.
            headers["x-should-retry"] = "false"
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def bad_request(message: str, param: str | None, code: str | None = None) -> ApiError:
    """Return the error for a request that cannot be served."""
    return ApiError(400, message, kind="invalid_request_error", param=param, code=code)


def unavailable(message: str) -> ApiError:
    """Return the error for an engine that is gone or a server that is going."""
    return ApiError(503, message, kind="server_error", code="engine_unavailable")


def timed_out(seconds: float | None) -> ApiError:
    """Return the error for a request whose own deadline passed."""
    message = f"the request did not finish within its timeout of {seconds} seconds"
    return ApiError(408, message, kind="timeout_error", param="timeout", code="timeout")


def failed(message: str) -> ApiError:
    """Return the error for a request that failed in the engine."""
    return ApiError(500, message, kind="server_error", code="engine_error")


def as_api_error(error: Exception) -> ApiError:
    """Translate an exception of ours."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return bad_request(str(error), error.field)
        case EngineError():
            return unavailable(str(error))
        case ConfigError():
            # Something is not installed; the message says what.
            return failed(str(error))
        case _:
            return failed("internal error")


def field_path(loc: Sequence[Any]) -> str:
    """Return a field's path as people write it: messages[0].content."""
    path = ""
    for part in loc:
        if type(part) is int:
            path += f"[{part}]"
        else:
            path += f".{part}" if path else str(part)
    # A JSON string may hold halves of characters, which no answer can carry.
    return path.encode(errors="replace").decode()


def validation_error(error: RequestValidationError) -> ApiError:
    """Name the first field of a body that does not fit."""
    first = error.errors()[0]
    loc = list(first["loc"])
    if loc and loc[0] in ("body", "query"):
        del loc[0]
    if first["type"] == "json_invalid":
        return bad_request(f"the body is not valid JSON: {first['ctx']['error']}", None, "invalid_json")
    path = field_path(loc) or None
    if first["type"] == "extra_forbidden":
        return bad_request(f"unknown field {path!r}", path, "unknown_field")
    if first["type"] == "missing":
        what = f"field {path!r} is required" if path else "the request has no body"
        return bad_request(what, path, "missing_field")
    if first["type"] == "unsupported":
        return bad_request(f"{path}: {first['msg']}", path, "unsupported_value")
    if path is None:
        return bad_request("the body must be a JSON object, sent as Content-Type: application/json", None)
    reason = first["ctx"]["error"] if first["type"] == "value_error" else first["msg"]
    return bad_request(f"{path}: {reason}", path, "invalid_value")


def install(app: FastAPI) -> None:
    """Make every error of an app take OpenAI's form."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return validation_error(error).response()

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path}"
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        response = ApiError(error.status_code, message, kind=kind).response()
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RequestError, on_api_error)
    app.add_exception_handler(EngineError, on_api_error)
    app.add_exception_handler(ConfigError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_api_error)
