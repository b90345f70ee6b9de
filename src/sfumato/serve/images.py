"""/v1/images: pictures from a prompt, or from a picture and a prompt; whole, or with previews on the way."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from sfumato.core.messages import Picture
from sfumato.engine.image_params import ImageParams
from sfumato.errors import NotSupported
from sfumato.serve.drawing import DrawCall, Drawing, collect_pictures
from sfumato.serve.errors import ApiError, bad_request, unavailable
from sfumato.serve.image_fields import size_text
from sfumato.serve.image_files import ImageFiles
from sfumato.serve.image_schema import EditRequest, GenerateRequest, PictureRequest
from sfumato.serve.metrics import Metrics
from sfumato.serve.pictures import decode_upload, encode_picture, load_pillow
from sfumato.serve.provenance import request_of
from sfumato.serve.registry import Registry, ServedModel
from sfumato.serve.streams import CLIENT_GONE, ClientGone, EventStream, json_response, until_gone
from sfumato.serve.uploads import read_form

router = APIRouter()
# Urls are given to whoever may see a picture, without a key; their names cannot be guessed.
open_router = APIRouter()

_FILES = "/v1/images/files"


@router.post("/v1/images/generations")
async def generate(request: Request, body: GenerateRequest) -> Response:
    """Draw pictures from a prompt."""
    body.check_answer()
    model = find_drawer(request, body.model, "image")
    return await _respond(request, body, model, body.params(model.image_traits), "image_generation")


@router.post("/v1/images/edits")
async def edit(request: Request) -> Response:
    """Draw pictures from a picture and a prompt."""
    form = await read_form(request, EditRequest.texts)
    images = form.files.pop("image", [])
    body = form.parse(EditRequest)
    body.check_answer()
    model = find_drawer(request, body.model, "image")
    traits = model.image_traits
    if not traits.takes_images:
        raise NotSupported(f"{traits.family} starts from no image", field="image")
    if len(images) != 1:
        raise bad_request(f"{len(images)} images are given; one is edited", "image", "invalid_value")
    content = await images[0].read()
    params = body.params(traits)
    size = None if body.size is None else (params.width or 0, params.height or 0)
    image = await asyncio.to_thread(decode_upload, content, size=size, unit=traits.size_unit)
    return await _respond(request, body, model, params.replaced(image=image), "image_edit")


@open_router.get(_FILES + "/{name}")
async def fetch(request: Request, name: str) -> Response:
    """Return a picture whose url was given out."""
    files: ImageFiles = request.app.state.image_files
    found = files.find(name)
    if found is None:
        raise ApiError(404, "no such picture, or its url has expired", kind="invalid_request_error")
    content, media_type = found
    return Response(content, media_type=media_type, headers={"Cache-Control": "private, max-age=3600"})


def find_drawer(request: Request, name: str | None, makes: str) -> ServedModel:
    """Return the model that is to draw. Raises ApiError, also while the server ends."""
    registry: Registry = request.app.state.registry
    if registry.is_draining:
        raise unavailable("the server is shutting down and takes no new requests")
    return registry.find_maker(name, makes)


@dataclass(frozen=True, slots=True)
class _Answer:
    """How one call's pictures are put into OpenAI's form; kind: what its events are called."""

    call: DrawCall
    body: PictureRequest
    kind: str
    files: ImageFiles
    base_url: str

    async def encoded(self, drawing: Drawing, picture: Picture) -> bytes:
        """Return a picture's file; finished ones carry the request."""
        call = self.call
        scheduler = call.model.image_traits.scheduler
        request = None
        if not picture.is_preview:
            request = request_of(
                call.model.name, call.params, drawing.spec, picture.index, scheduler=scheduler
            )
        return await asyncio.to_thread(
            encode_picture,
            picture,
            output_format=self.body.file_format,
            quality=self.body.output_compression,
            request=request,
        )

    async def whole(self, starting: Coroutine[Any, Any, Drawing]) -> dict[str, Any]:
        """Return all pictures at once."""
        drawing = await starting
        try:
            pictures = await collect_pictures(drawing)
            contents = [await self.encoded(drawing, picture) for picture in pictures]
        finally:
            drawing.close()
        seeds = drawing.spec.seeds
        return {
            "id": self.call.id,
            "created": self.call.created,
            "model": self.call.model.name,
            "data": [
                {**self._entry(content), "seed": seeds[index % len(seeds)]}
                for index, content in enumerate(contents)
            ],
            "background": "opaque",
            "output_format": self.body.file_format,
            "size": size_text(drawing.spec.width, drawing.spec.height),
            "seed": self.call.params.seed,
            "usage": drawing.usage_field(),
        }

    def _entry(self, content: bytes) -> dict[str, Any]:
        if self.body.response_format != "url":
            return {"b64_json": _base64(content)}
        name = self.files.add(content, extension=self.body.file_format, media_type=self.body.media_type)
        return {"url": f"{self.base_url}{_FILES}/{name}"}

    async def events(self, drawing: Drawing) -> AsyncIterator[dict[str, Any]]:
        """Yield previews, progress where it is wanted, and the picture."""
        num_previews = 0
        async for output in drawing.news():
            if self.body.include_progress and output.step is not None:
                done, total = output.step.done, output.step.total
                yield {"type": f"{self.kind}.progress", "step": done, "num_steps": total}
            for picture in output.pictures:
                if picture.is_preview:
                    event = await self._event(drawing, picture, "partial_image")
                    yield {**event, "partial_image_index": num_previews, "step": picture.step}
                    num_previews += 1
                else:
                    event = await self._event(drawing, picture, "completed")
                    yield {**event, "usage": drawing.usage_field()}

    async def _event(self, drawing: Drawing, picture: Picture, what: str) -> dict[str, Any]:
        return {
            "type": f"{self.kind}.{what}",
            "b64_json": _base64(await self.encoded(drawing, picture)),
            "created_at": int(time.time()),
            "size": size_text(picture.width, picture.height),
            "quality": "auto",
            "background": "opaque",
            "output_format": self.body.file_format,
            "model": self.call.model.name,
            "seed": self.call.params.seed,
        }


async def _respond(
    request: Request, body: PictureRequest, model: ServedModel, params: ImageParams, kind: str
) -> Response:
    """Start a call and answer it, as events or at once; a client that left ends it."""
    # What is missing is said now, not when the pictures are drawn.
    load_pillow()
    call = DrawCall.of(
        model,
        params,
        endpoint=request.url.path,
        prefix="img",
        priority=body.priority,
        timeout=body.timeout,
    )
    metrics: Metrics = request.app.state.metrics
    base_url = str(request.base_url).rstrip("/")
    answer = _Answer(call, body, kind, request.app.state.image_files, base_url)
    starting = Drawing.start(call, metrics)
    try:
        if body.stream:
            drawing = await until_gone(request, starting)
            return EventStream(answer.events(drawing), drawing.close, is_typed=True)
        return json_response(await until_gone(request, answer.whole(starting)))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
