"""/v1/images with the official client: whole, streamed, edited, repeated, ended early."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import httpx
import numpy as np
import pytest
from openai import APIStatusError, BadRequestError, OpenAI
from PIL import Image

from sfumato.serve.pictures import read_request
from tests.serve.running import SD3, SD15, WAN, Server

PROMPT = "a red circle above a green square"
# A request that lasts for seconds.
LONG: dict[str, Any] = {"num_inference_steps": 900}


def opened(b64_json: str | None) -> Any:
    image = Image.open(io.BytesIO(base64.b64decode(b64_json or "")))
    image.load()
    return image


def draw(client: OpenAI, model: str = SD3, **fields: Any) -> Any:
    ours = {"num_inference_steps": 3, "seed": 7} | fields.pop("extra_body", {})
    return client.images.generate(model=model, prompt=PROMPT, extra_body=ours, **fields)


def png(width: int = 32, height: int = 32) -> bytes:
    ramp = np.linspace(0, 255, width * height * 3).astype(np.uint8).reshape(height, width, 3)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "png")
    return file.getvalue()


def test_a_picture_is_drawn_and_says_what_drew_it(artist: OpenAI) -> None:
    answer = draw(artist, n=2, size="32x16", extra_body={"negative_prompt": "blue", "guidance_scale": 4.0})
    assert answer.size == "32x16"
    assert (answer.output_format, answer.background, answer.model) == ("png", "opaque", SD3)
    assert answer.usage.denoise_steps == answer.usage.nfe == 3
    images = [opened(entry.b64_json) for entry in answer.data]
    assert [image.size for image in images] == [(32, 16)] * 2
    assert images[0].tobytes() != images[1].tobytes()
    assert [entry.seed for entry in answer.data] == [7, 8]
    told = read_request(base64.b64decode(answer.data[1].b64_json))
    assert told is not None
    assert told["seed"] == 8
    assert told["scheduler"] == {"name": "FlowMatchEulerDiscreteScheduler", "options": {}}
    assert (told["model"], told["num_inference_steps"], told["guidance_scale"]) == (SD3, 3, 4.0)


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (SD3, {}),
        (SD3, {"scheduler": "FlowMatchHeunDiscreteScheduler", "max_sequence_length": 16}),
        (SD3, {"sigmas": [1.0, 0.5, 0.2]}),
        (SD15, {"guidance_rescale": 0.5, "guidance_scale": 3}),
        (
            SD15,
            {"scheduler": {"name": "DDIMScheduler", "options": {"timestep_spacing": "trailing"}}, "eta": 0.5},
        ),
    ],
)
def test_what_a_picture_carries_draws_it_again(
    drawing: Server, artist: OpenAI, model: str, fields: dict[str, Any]
) -> None:
    first = draw(artist, model, extra_body=fields).data[0].b64_json
    told = read_request(base64.b64decode(first))
    again = drawing.http.post("/v1/images/generations", json=told)
    assert again.status_code == 200, again.text
    assert opened(again.json()["data"][0]["b64_json"]).tobytes() == opened(first).tobytes()


def test_formats_and_sizes_of_files(artist: OpenAI) -> None:
    sizes = []
    for quality in (10, 95):
        for kind in ("jpeg", "webp"):
            answer = draw(artist, output_format=kind, output_compression=quality)
            content = base64.b64decode(answer.data[0].b64_json)
            assert opened(answer.data[0].b64_json).format == kind.upper()
            assert (read_request(content) or {})["seed"] == 7
            sizes.append(len(content))
    assert sizes[0] < sizes[2]
    assert sizes[1] < sizes[3]


def test_a_url_can_be_fetched_without_a_key(drawing: Server, artist: OpenAI) -> None:
    url = draw(artist, response_format="url").data[0].url
    assert url.startswith(drawing.url)
    answer = httpx.get(url)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert (read_request(answer.content) or {})["seed"] == 7
    missing = httpx.get(f"{drawing.url}/v1/images/files/nothing.png")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "invalid_request_error"


def test_previews_are_streamed_and_the_last_one_is_the_picture(artist: OpenAI) -> None:
    ours = {"num_inference_steps": 8, "seed": 7}
    whole = draw(artist, extra_body=ours).data[0].b64_json
    with artist.images.generate(
        model=SD3, prompt=PROMPT, stream=True, partial_images=3, extra_body=ours
    ) as stream:
        events: list[Any] = list(stream)
    assert [type(event).__name__ for event in events] == ["ImageGenPartialImageEvent"] * 3 + [
        "ImageGenCompletedEvent"
    ]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    last = events[-1]
    assert last.type == "image_generation.completed"
    assert opened(last.b64_json).tobytes() == opened(whole).tobytes()
    assert last.usage.denoise_steps == 8
    assert last.size == "32x32"
    assert len({event.b64_json for event in events}) == 4


def test_progress_is_streamed_where_it_is_wanted(drawing: Server) -> None:
    body = {
        "model": SD3,
        "prompt": PROMPT,
        "num_inference_steps": 4,
        "stream": True,
        "include_progress": True,
    }
    text = drawing.http.post("/v1/images/generations", json=body).text
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert names[-1] == "image_generation.completed"
    assert names.count("image_generation.progress") == 5
    assert '"step":4,"num_steps":4' in text


def test_the_async_client_draws_too(drawing: Server) -> None:
    from openai import AsyncOpenAI

    async def run() -> None:
        async with AsyncOpenAI(
            base_url=f"{drawing.url}/v1", api_key="secret-of-the-tests", max_retries=0
        ) as client:
            ours = {"num_inference_steps": 4, "seed": 7}
            drawn = [
                client.images.generate(model=model, prompt=PROMPT, extra_body=ours)
                for model in (SD3, SD15, SD3)
            ]
            first, _, third = await asyncio.gather(*drawn)
            assert first.data is not None
            assert third.data is not None
            assert opened(first.data[0].b64_json).size == (32, 32)
            stream = await client.images.generate(
                model=SD3, prompt=PROMPT, stream=True, partial_images=1, extra_body=ours
            )
            assert [event.type async for event in stream] == [
                "image_generation.partial_image",
                "image_generation.completed",
            ]
            edited = await client.images.edit(
                model=SD3, prompt=PROMPT, image=("a.png", png()), extra_body=ours
            )
            assert edited.data is not None
            assert opened(edited.data[0].b64_json).size == (32, 32)

    asyncio.run(run())


def test_a_picture_is_edited(artist: OpenAI) -> None:
    def edit(**fields: Any) -> Any:
        ours = {"num_inference_steps": 4, "seed": 7} | fields.pop("extra_body", {})
        return artist.images.edit(
            model=SD3, prompt=PROMPT, image=("start.png", png(), "image/png"), extra_body=ours, **fields
        )

    little = opened(edit(extra_body={"strength": 0.25}).data[0].b64_json)
    much = opened(edit(extra_body={"strength": 1.0}).data[0].b64_json)
    assert little.size == (32, 32)
    assert little.tobytes() != much.tobytes()
    ours = {"scheduler": {"name": "FlowMatchEulerDiscreteScheduler", "options": {"shift": 2.0}}}
    other = edit(size="16x16", n=2, extra_body=ours | {"sigmas": [1.0, 0.5], "negative_prompt": "7"})
    assert [opened(entry.b64_json).size for entry in other.data] == [(16, 16)] * 2
    assert (read_request(base64.b64decode(other.data[0].b64_json)) or {})["scheduler"] == ours["scheduler"]
    listed: Any = [("start.png", png(), "image/png")]
    ours = {"num_inference_steps": 4, "seed": 7, "strength": 0.25}
    again = artist.images.edit(model=SD3, prompt=PROMPT, image=listed, extra_body=ours)
    assert opened((again.data or [])[0].b64_json).tobytes() == little.tobytes()
    with edit(stream=True, partial_images=1, extra_body={"strength": 1.0}) as stream:
        events: list[Any] = list(stream)
    assert [type(event).__name__ for event in events] == [
        "ImageEditPartialImageEvent",
        "ImageEditCompletedEvent",
    ]


def test_models_say_what_may_be_chosen(artist: OpenAI) -> None:
    listed: list[Any] = artist.models.list().data
    assert [(model.id, model.makes) for model in listed] == [(SD15, "image"), (SD3, "image"), (WAN, "video")]
    sd3 = listed[1]
    assert (sd3.default_size, sd3.size_unit, sd3.default_num_inference_steps) == ("32x32", 4, 28)
    assert sd3.default_scheduler in sd3.schedulers
    assert "strength" in sd3.fields
    assert listed[2].frames_unit == 4


def test_a_model_of_the_other_kind_says_whom_to_ask(artist: OpenAI, client: OpenAI) -> None:
    for ask, where in (
        (
            lambda: artist.chat.completions.create(model=SD3, messages=[{"role": "user", "content": "x"}]),
            "images",
        ),
        (lambda: artist.completions.create(model=SD3, prompt="x"), "images"),
        (lambda: artist.images.generate(model=WAN, prompt="x"), "videos"),
        (lambda: client.images.generate(model="sfumato-tiny-sdar", prompt="x"), "chat/completions"),
    ):
        with pytest.raises(BadRequestError) as refused:
            ask()
        assert refused.value.param == "model"
        assert f"/v1/{where}" in refused.value.message
    with pytest.raises(APIStatusError) as missing:
        client.images.generate(prompt="x")
    assert missing.value.code == "model_not_found"


def test_a_client_that_leaves_ends_its_request(drawing: Server) -> None:
    body = {"model": SD15, "prompt": PROMPT, **LONG}
    for stream in (False, True):
        with pytest.raises(httpx.ReadTimeout):
            drawing.http.post("/v1/images/generations", json=body | {"stream": stream}, timeout=0.3)
        assert drawing.wait_for("sfumato_running_requests", SD15, 0)


def test_a_deadline_ends_a_request(artist: OpenAI) -> None:
    with pytest.raises(APIStatusError) as late:
        draw(artist, SD15, extra_body={**LONG, "timeout": 0.2})
    assert (late.value.status_code, late.value.code) == (408, "timeout")
    with (
        artist.images.generate(
            model=SD15, prompt=PROMPT, stream=True, extra_body={**LONG, "timeout": 0.2}
        ) as stream,
        pytest.raises(Exception, match="timeout"),
    ):
        list(stream)


def test_metrics_count_steps_stages_and_pictures(drawing: Server, artist: OpenAI) -> None:
    def series() -> str:
        return drawing.http.get("/metrics").text

    with artist.images.generate(
        model=SD3, prompt=PROMPT, stream=True, partial_images=1, extra_body={"num_inference_steps": 4}
    ) as stream:
        list(stream)
    text = series()
    for kind in ("encode", "denoise", "decode"):
        assert f'sfumato_rows_total{{kind="{kind}",model="{SD3}"}}' in text
        assert f'sfumato_step_seconds_count{{kind="{kind}",model="{SD3}",part="device"}}' in text
    ended = f'{{end="stop",endpoint="/v1/images/generations",model="{SD3}"}}'
    assert f"sfumato_requests_total{ended}" in text
    assert f'sfumato_pictures_total{{endpoint="/v1/images/generations",model="{SD3}"}}' in text
    assert f'sfumato_previews_total{{model="{SD3}"}}' in text
    assert f'sfumato_time_to_first_preview_seconds_count{{model="{SD3}"}}' in text
