"""Bodies that hold files: a bound for their size, and forms that become what JSON would have said."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato.serve.errors import ApiError, bad_request
from sfumato.serve.image_schema import DrawingRequest

_Body = TypeVar("_Body", bound=DrawingRequest)
_FORM = "multipart/form-data"


class BodyLimit:
    """Refuses bodies that are larger than a server will hold in memory, before or while they come."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and count what it sends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"")
        if told.isdigit() and int(told) > self._max_bytes:
            await self._refusal().response()(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(413, self._refusal().message)
            return message

        await self._app(scope, counted, send)

    def _refusal(self) -> ApiError:
        message = f"the body is larger than {self._max_bytes} bytes"
        return ApiError(413, message, kind="invalid_request_error", code="body_too_large")


@dataclass(slots=True)
class Form:
    """The parts of a form: values by name as JSON has them, and files by name."""

    fields: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[UploadFile]] = field(default_factory=dict)

    def parse(self, body: type[_Body]) -> _Body:
        """Return the fields as a body; a file that is left has no meaning, which the body says by name.

        Raises RequestValidationError.
        """
        return _validated(body, self.fields | dict.fromkeys(self.files, "a file"))


def _validated(body: type[_Body], content: object) -> _Body:
    """Return a parsed body. Raises RequestValidationError, whose answers are those of FastAPI's own."""
    try:
        return body.model_validate(content)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


async def read_body(request: Request, body: type[_Body]) -> _Body:
    """Return a body that comes as JSON or as a form. Raises ApiError or RequestValidationError."""
    if _is_form(request):
        return (await read_form(request, body.texts)).parse(body)
    try:
        content = json.loads(await request.body())
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON: {error}", None, "invalid_json") from error
    return _validated(body, content)


def _is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == _FORM


async def read_form(request: Request, texts: frozenset[str]) -> Form:
    """Return the parts of a multipart body; texts: fields that are text whatever they look like.

    Raises ApiError for another kind of body.
    """
    if not _is_form(request):
        raise bad_request(f"the body must be sent as Content-Type: {_FORM}", None)
    try:
        parts = (await request.form()).multi_items()
    except HTTPException as error:
        raise ApiError(error.status_code, error.detail, kind="invalid_request_error") from error
    form = Form()
    for name, value in parts:
        path = re.findall(r"[^\[\]]+", name)
        if not path:
            raise bad_request("a part of the form has no name", None)
        if isinstance(value, UploadFile):
            form.files.setdefault(path[0], []).append(value)
        else:
            parsed = value if path[0] in texts else _json_value(value)
            _put(form.fields, path, parsed, is_list=name.endswith("[]"))
    return form


def _json_value(text: str) -> Any:
    """Return what a value of a form says: JSON where it is any, null for nothing, else the text."""
    if not text:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _put(fields: dict[str, Any], path: list[str], value: Any, *, is_list: bool) -> None:
    """Put a value where a name such as scheduler[options][eta] or sigmas[] says."""
    for name in path[:-1]:
        inner = fields.setdefault(name, {})
        if not isinstance(inner, dict):
            raise bad_request(f"{name} is given twice, as a value and as an object", name)
        fields = inner
    if not is_list:
        fields[path[-1]] = value
        return
    values = fields.setdefault(path[-1], [])
    if not isinstance(values, list):
        raise bad_request(f"{path[-1]} is given twice, as a value and as a list", path[-1])
    values.append(value)
