"""/v1/videos with the official client: a job is created, asked after, fetched, listed and deleted."""

from __future__ import annotations

import asyncio
import io
import json
import time
from typing import Any

import av
import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from PIL import Image

from tests.serve.running import KEY, WAN, Server

# The client says that OpenAI's own service ends; its types stay.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

PROMPT = "a red circle that rises"
OURS: dict[str, Any] = {"num_inference_steps": 3, "seed": 7}


def create(client: OpenAI, **fields: Any) -> Any:
    ours = OURS | fields.pop("extra_body", {})
    size: Any = "32x16"
    return client.videos.create(model=WAN, prompt=PROMPT, size=size, extra_body=ours, **fields)


def finished(client: OpenAI, video_id: str) -> Any:
    return client.videos.poll(video_id, poll_interval_ms=20)


def test_a_video_is_made(drawing: Server, artist: OpenAI) -> None:
    video = create(artist, extra_body={"num_frames": 9})
    assert video.status in ("queued", "in_progress")
    assert (video.object, video.model, video.size) == ("video", WAN, "32x16")
    done = finished(artist, video.id)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert done.num_frames == 9
    assert done.expires_at > done.completed_at >= done.created_at
    content = artist.videos.download_content(video.id).read()
    with av.open(io.BytesIO(content)) as container:
        frames = list(container.decode(video=0))
        told = json.loads(container.metadata["comment"])
        assert container.streams.video[0].average_rate == 16
    assert len(frames) == 9
    assert (frames[0].width, frames[0].height) == (32, 16)
    assert told["seed"] == 7
    again = drawing.http.post("/v1/videos", json=told).json()
    assert finished(artist, again["id"]).status == "completed"
    assert artist.videos.download_content(again["id"]).read() == content
    thumbnail = artist.videos.download_content(video.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(thumbnail)).size == (32, 16)
    with pytest.raises(BadRequestError, match="spritesheet"):
        artist.videos.download_content(video.id, variant="spritesheet")


def test_seconds_become_frames(artist: OpenAI) -> None:
    seconds: Any
    for seconds, num_frames in (("1", 17), ("0.25", 5), ("4", 65)):
        video = create(artist, seconds=seconds, extra_body={"num_inference_steps": 1})
        assert video.num_frames == num_frames
        artist.videos.delete(video.id)


def test_videos_are_listed_and_deleted(artist: OpenAI) -> None:
    names = [create(artist, extra_body={"num_frames": 1}).id for _ in range(3)]
    listed = [video.id for video in artist.videos.list(limit=2)]
    assert listed[:3] == names[::-1]
    assert [video.id for video in artist.videos.list(after=names[1], order="asc").data] == [names[2]]
    for name in names:
        gone = artist.videos.delete(name)
        assert (gone.id, gone.object, gone.deleted) == (name, "video.deleted", True)
    for ask in (artist.videos.retrieve, artist.videos.delete, artist.videos.download_content):
        with pytest.raises(NotFoundError) as missing:
            ask(names[0])
        assert missing.value.code == "video_not_found"


def test_a_deleted_video_is_no_longer_made(drawing: Server, artist: OpenAI) -> None:
    video = create(artist, extra_body={"num_inference_steps": 900, "num_frames": 17})
    with pytest.raises(BadRequestError) as early:
        artist.videos.download_content(video.id)
    assert early.value.code == "video_not_ready"
    end = time.monotonic() + 10
    while artist.videos.retrieve(video.id).progress < 1:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert artist.videos.retrieve(video.id).status == "in_progress"
    artist.videos.delete(video.id)
    assert drawing.wait_for("sfumato_running_requests", WAN, 0)


def test_a_video_fails_alone(artist: OpenAI) -> None:
    video = create(artist, extra_body={"num_inference_steps": 900, "num_frames": 17, "timeout": 0.2})
    failed = finished(artist, video.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "timeout"
    assert finished(artist, create(artist, extra_body={"num_frames": 1}).id).status == "completed"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"num_frames": 6}, "num_frames"),
        ({"size": "40x40"}, "size"),
        ({"seconds": "long"}, "seconds"),
        ({"seconds": 4, "num_frames": 17}, "seconds"),
        ({"input_reference": {"file_id": "x"}}, "input_reference"),
        ({"eta": 0.5}, "eta"),
        ({"n": 2}, "n"),
        ({"prompt": None}, "prompt"),
        ({"model": "sd3-tiny"}, "model"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(drawing: Server, fields: dict[str, Any], param: str) -> None:
    answer = drawing.http.post("/v1/videos", json={"model": WAN, "prompt": PROMPT} | OURS | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_file_to_start_from_is_refused_by_name(artist: OpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        create(artist, input_reference=("a.png", b"x", "image/png"))
    assert refused.value.param == "input_reference"
    with pytest.raises(APIStatusError) as refused_list:
        artist.videos.list(limit=0)
    assert refused_list.value.param == "limit"  # type: ignore[attr-defined]


def test_the_async_client_makes_videos_too(drawing: Server) -> None:
    async def run() -> None:
        async with AsyncOpenAI(base_url=f"{drawing.url}/v1", api_key=KEY, max_retries=0) as client:
            size: Any = "16x16"
            video = await client.videos.create_and_poll(
                prompt=PROMPT, size=size, extra_body=OURS | {"num_frames": 5}, poll_interval_ms=20
            )
            assert video.status == "completed"
            content = await client.videos.download_content(video.id)
            assert content.read()[4:8] == b"ftyp"

    asyncio.run(run())
