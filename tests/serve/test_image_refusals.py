"""What is not drawn is refused by name, in OpenAI's form; every documented field of pictures is known."""

from __future__ import annotations

import asyncio
import io
import json
import typing
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from openai.types import image_edit_params, image_generate_params, video_create_params
from PIL import Image

from sfumato.core.messages import Picture
from sfumato.errors import ConfigError
from sfumato.serve import errors, pictures
from sfumato.serve.image_files import ImageFiles
from sfumato.serve.image_schema import DrawingRequest, EditRequest, GenerateRequest, VideoRequest
from sfumato.serve.uploads import BodyLimit
from sfumato.serve.video_jobs import VideoJobs
from tests.serve.running import SD3, SD15, Server

BODY: dict[str, Any] = {"model": SD3, "prompt": "a red circle", "num_inference_steps": 1}
# Every documented field with a value that we do not serve.
REFUSED: dict[str, Any] = {
    "background": "transparent",
    "complexity": "high",
    "frame_count": 9,
    "frame_duration_ms": 100,
    "output_format": "gif",
    "quality": "high",
    "style": "vivid",
    "svg": {"model": "x"},
}
REFUSED_EDIT: dict[str, Any] = {"input_fidelity": "high", "mask": "x", "markup": "x"}
NEUTRAL: dict[str, Any] = {
    "background": "auto",
    "moderation": "low",
    "output_compression": 100,
    "quality": "auto",
    "safety_identifier": "s",
    "size": "auto",
    "user": "someone",
    "n": 1,
    "partial_images": 0,
    "stream": False,
    "response_format": "b64_json",
}


def documented(types: Any, name: str) -> set[str]:
    kinds = [kind for kind in (f"{name}NonStreaming", f"{name}Streaming", name) if hasattr(types, kind)]
    return {
        field
        for kind in kinds
        if hasattr(getattr(types, kind), "__total__")
        for field in typing.get_type_hints(getattr(types, kind))
    }


@pytest.mark.parametrize(
    ("types", "name", "schema", "files"),
    [
        (image_generate_params, "ImageGenerateParams", GenerateRequest, set()),
        (image_edit_params, "ImageEditParams", EditRequest, {"image"}),
        (video_create_params, "VideoCreateParams", VideoRequest, set()),
    ],
)
def test_every_documented_field_is_known_and_null_is_legal(
    types: Any, name: str, schema: type[DrawingRequest], files: set[str]
) -> None:
    fields = documented(types, name)
    assert len(fields) >= 5
    assert fields - files <= set(schema.model_fields)
    schema.model_validate({"prompt": "x"} | dict.fromkeys(fields - files))


def test_every_documented_field_works_or_is_refused() -> None:
    drawn = documented(image_generate_params, "ImageGenerateParams")
    assert drawn == {"prompt", "model", *NEUTRAL, *REFUSED}
    edited = documented(image_edit_params, "ImageEditParams")
    assert edited == {"prompt", "model", "image", *NEUTRAL, *REFUSED, *REFUSED_EDIT} - {
        "style",
        "moderation",
    }


@pytest.mark.parametrize("name", REFUSED)
def test_drawing_refuses_by_name(drawing: Server, name: str) -> None:
    refused(drawing, {name: REFUSED[name]}, param=name)


def test_neutral_values_are_legal(drawing: Server) -> None:
    answer = drawing.http.post("/v1/images/generations", json=BODY | NEUTRAL)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stepps": 5}, "stepps"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"size": "33x32"}, "size"),
        ({"size": "0x32"}, "size"),
        ({"size": "32"}, "size"),
        ({"size": "65536x65536"}, "size"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"guidance_scale": "7"}, "guidance_scale"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 63}, "seed"),
        ({"scheduler": "DDIMScheduler"}, "scheduler"),
        ({"scheduler": {"name": "FlowMatchEulerDiscreteScheduler", "options": {"x": 1}}}, "scheduler"),
        ({"scheduler": {"options": {}}}, "scheduler.name"),
        ({"model": SD15, "scheduler": {"name": "DDIMScheduler", "options": {"beta_start": -1}}}, "scheduler"),
        (
            {"model": SD15, "scheduler": {"name": "PNDMScheduler", "options": {"trained_betas": 0}}},
            "scheduler",
        ),
        (
            {"scheduler": {"name": "UniPCMultistepScheduler", "options": {"solver_order": 1 << 30}}},
            "scheduler.options",
        ),
        ({"scheduler": "\ud800"}, "scheduler.name"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"model": "\ud800"}, "model"),
        ({"timesteps": [1 << 70]}, "timesteps[0]"),
        ({"sigmas": [0.5, "x"]}, "sigmas[1]"),
        ({"sigmas": [1.0], "timesteps": [5]}, "sigmas"),
        ({"strength": 0.5}, "strength"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale"),
        ({"eta": 0.5}, "eta"),
        ({"class_labels": [3]}, "class_labels"),
        ({"original_size": [1]}, "original_size"),
        ({"num_frames": 5}, "num_frames"),
        ({"partial_images": 2}, "partial_images"),
        ({"partial_images": 17, "stream": True}, "partial_images"),
        ({"include_progress": True}, "include_progress"),
        ({"n": 2, "stream": True}, "n"),
        ({"response_format": "url", "stream": True}, "response_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_format": "bmp"}, "output_format"),
        ({"timeout": 0}, "timeout"),
        ({"model": "sdxl"}, "model"),
    ],
)
def test_wrong_values_name_the_field(drawing: Server, fields: dict[str, Any], param: str) -> None:
    refused(drawing, fields, param=param)


def refused(drawing: Server, fields: dict[str, Any], *, param: str) -> str:
    # The body is written with escapes, so that halves of characters reach the server.
    answer = drawing.http.post(
        "/v1/images/generations",
        content=json.dumps(BODY | fields),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert error["message"]
    return str(error["message"])


def test_a_refused_size_comes_with_those_that_can_be_drawn(drawing: Server) -> None:
    assert "multiples of 4, such as 32x28, 36x32 or its default 32x32" in refused(
        drawing, {"size": "35x30"}, param="size"
    )
    scheduler = refused(drawing, {"scheduler": "guess"}, param="scheduler")
    assert "FlowMatchEulerDiscreteScheduler" in scheduler


def png(mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 100).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    ("files", "fields", "param"),
    [
        ({"image": b"no picture"}, {}, "image"),
        ({"image": png(), "image[]": png()}, {}, "image"),
        ({}, {}, "image"),
        ({"image": png(), "mask": png("L")}, {}, "mask"),
        ({"image": png(), "other": png()}, {}, "other"),
        ({"image": png()}, {"strength": "2"}, "strength"),
        ({"image": png()}, {"strength": "much"}, "strength"),
        ({"image": png()}, {"input_fidelity": "high"}, "input_fidelity"),
        ({"image": png()}, {"scheduler[name]": "DDIMScheduler"}, "scheduler"),
        ({"image": png()}, {"scheduler": "x", "scheduler[name]": "x"}, "scheduler"),
        ({"image": png()}, {"sigmas": "1", "sigmas[]": "1"}, "sigmas"),
        ({"image": png()}, {"[]": "1"}, None),
    ],
)
def test_wrong_forms_name_the_field(
    drawing: Server, files: dict[str, bytes], fields: dict[str, Any], param: str | None
) -> None:
    parts: list[Any] = [(name, (None, str(value))) for name, value in (BODY | fields).items()]
    parts += [(name, (f"{name}.png", content)) for name, content in files.items()]
    answer = drawing.http.post("/v1/images/edits", files=parts)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_what_is_no_form_or_no_json_is_refused(drawing: Server) -> None:
    for path, content, kind in (
        ("/v1/images/edits", "{}", "application/json"),
        ("/v1/images/edits", "x", "multipart/form-data; boundary=y"),
        ("/v1/images/generations", "[]", "application/json"),
        ("/v1/videos", "[]", "application/json"),
        ("/v1/videos", "{", "application/json"),
    ):
        answer = drawing.http.post(path, content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400, answer.text
        assert "error" in answer.json()


def test_any_picture_becomes_an_input_of_a_legal_size(drawing: Server) -> None:
    for mode, size in (("RGBA", (35, 17)), ("L", (3, 3)), ("P", (32, 32))):
        form = {"model": SD15, "prompt": "x", "num_inference_steps": "2", "strength": "0.5"}
        files = {"image": ("a.png", png(mode, size))}
        answer = drawing.http.post("/v1/images/edits", data=form, files=files)
        assert answer.status_code == 200, answer.text


def test_nothing_opens_without_a_key(drawing: Server) -> None:
    for method, path in (
        ("POST", "/v1/images/generations"),
        ("POST", "/v1/images/edits"),
        ("POST", "/v1/videos"),
        ("GET", "/v1/videos"),
        ("GET", "/v1/videos/x"),
        ("GET", "/v1/videos/x/content"),
        ("DELETE", "/v1/videos/x"),
    ):
        assert httpx.request(method, f"{drawing.url}{path}").status_code == 401, path


def test_large_bodies_are_refused_before_they_are_read(drawing: Server) -> None:
    connection = HTTPConnection(drawing.url.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", "/v1/images/edits")
    connection.putheader("Content-Length", str(51 << 20))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    assert b"body_too_large" in answer.read()
    connection.close()


def test_bodies_are_counted_as_they_come() -> None:
    app = FastAPI()

    @app.post("/")
    async def size(request: Request) -> int:
        return len(await request.body())

    app.add_middleware(BodyLimit, max_bytes=10)
    errors.install(app)

    async def chunks() -> Any:
        for _ in range(4):
            yield b"four"

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            assert (await client.post("/", content=b"0123456789")).json() == 10
            for content in (b"0123456789x", chunks()):
                answer = await client.post("/", content=content)
                assert answer.status_code == 413
                assert answer.json()["error"]["type"] == "invalid_request_error"

    asyncio.run(run())


def test_files_are_kept_within_bounds() -> None:
    now = 0.0
    files = ImageFiles(max_bytes=10, seconds=5, clock=lambda: now)
    names = [files.add(bytes(4), extension="png", media_type="image/png") for _ in range(3)]
    assert len(set(names)) == 3
    assert [files.find(name) is not None for name in names] == [False, True, True]
    now = 5.0
    assert files.find(names[2]) is None
    large = files.add(bytes(100), extension="png", media_type="image/png")
    assert files.find(large) == (bytes(100), "image/png")


class _Ended:
    """A video job that has ended, as far as a store looks at it."""

    def __init__(self, name: str, ended_at: float | None) -> None:
        self.id, self.ended_at, self.num_bytes = name, ended_at, 4

    @property
    def has_ended(self) -> bool:
        return self.ended_at is not None


def test_videos_are_kept_within_bounds() -> None:
    now = 0.0
    jobs = VideoJobs(max_jobs=3, max_bytes=10, clock=lambda: now)
    kept: Any = {name: _Ended(name, 0.0) for name in "abc"}
    jobs._jobs = kept
    assert [job.id for job in jobs.newest()] == ["c", "b"]
    now = 4000.0
    assert jobs.newest() == []
    running: Any = {name: _Ended(name, None) for name in "abc"}
    jobs._jobs = running
    with pytest.raises(errors.ApiError) as full:
        jobs.check_room()
    assert full.value.status == 429


def test_without_pillow_or_av_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato.serve import movies

    for name, load, extra in (("PIL", pictures.load_pillow, "image"), ("av", movies.load_av, "video")):
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with pytest.raises(ConfigError, match=rf"sfumato\[{extra}\]") as missing:
            load()
        assert errors.as_api_error(missing.value).status == 500


def test_pictures_carry_their_request_in_every_format() -> None:
    picture = Picture(
        index=0, step=1, is_preview=False, num_frames=1, height=2, width=3, pixels=bytes(range(18))
    )
    request = {"prompt": "Köln 日本", "seed": 1 << 62}
    for output_format in ("png", "jpeg", "webp"):
        content = pictures.encode_picture(picture, output_format=output_format, request=request)
        assert pictures.read_request(content) == request
        plain = pictures.encode_picture(picture, output_format=output_format)
        assert pictures.read_request(plain) is None
    long = {"prompt": "x" * 70_000}
    assert pictures.read_request(pictures.encode_picture(picture, request=long)) == long
    assert pictures.read_request(pictures.encode_picture(picture, output_format="jpeg", request=long)) is None
