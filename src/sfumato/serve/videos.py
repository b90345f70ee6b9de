"""/v1/videos: a video is a job that is created, asked after, fetched and deleted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from sfumato.serve.drawing import DrawCall, Drawing
from sfumato.serve.errors import bad_request
from sfumato.serve.image_schema import VideoRequest
from sfumato.serve.images import find_drawer
from sfumato.serve.movies import MEDIA_TYPE, load_av
from sfumato.serve.pictures import MEDIA_TYPES, load_pillow
from sfumato.serve.streams import CLIENT_GONE, ClientGone, json_response, until_gone
from sfumato.serve.uploads import read_body
from sfumato.serve.video_jobs import VideoJobs

router = APIRouter()

_MAX_LISTED = 100


@router.post("/v1/videos")
async def create(request: Request) -> Response:
    """Begin a video, from JSON or from a form."""
    body = await read_body(request, VideoRequest)
    model = find_drawer(request, body.model, "video")
    # What is missing is said now, not when the video is made.
    load_av()
    load_pillow()
    jobs: VideoJobs = request.app.state.video_jobs
    jobs.check_room()
    call = DrawCall.of(
        model,
        body.params(model.image_traits),
        endpoint="/v1/videos",
        prefix="video",
        priority=body.priority,
        timeout=body.timeout,
    )
    try:
        drawing = await until_gone(request, Drawing.start(call, request.app.state.metrics))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    return json_response(jobs.add(drawing).describe())


@router.get("/v1/videos")
async def list_videos(
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """List videos, the newest first unless asked otherwise."""
    jobs: VideoJobs = request.app.state.video_jobs
    found = jobs.newest()
    if order == "asc":
        found.reverse()
    if after is not None:
        found = found[found.index(jobs.find(after)) + 1 :]
    page = [job.describe() for job in found[:limit]]
    answer: dict[str, Any] = {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(found) > limit,
    }
    return json_response(answer)


@router.get("/v1/videos/{video_id}")
async def retrieve(request: Request, video_id: str) -> Response:
    """Say how far a video is."""
    jobs: VideoJobs = request.app.state.video_jobs
    return json_response(jobs.find(video_id).describe())


@router.get("/v1/videos/{video_id}/content")
async def content(
    request: Request, video_id: str, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
) -> Response:
    """Return a finished video, or a picture of its beginning."""
    jobs: VideoJobs = request.app.state.video_jobs
    job = jobs.find(video_id)
    if variant == "spritesheet":
        raise bad_request(
            "spritesheet is not made here; take video or thumbnail", "variant", "unsupported_value"
        )
    if not job.content:
        # Not 409, which the official client would ask again and again.
        raise bad_request(f"the video is {job.status}, it has no content", "video_id", "video_not_ready")
    if variant == "thumbnail":
        return Response(job.thumbnail, media_type=MEDIA_TYPES["webp"])
    return Response(job.content, media_type=MEDIA_TYPE)


@router.delete("/v1/videos/{video_id}")
async def delete(request: Request, video_id: str) -> Response:
    """Forget a video; one that is being made ends."""
    jobs: VideoJobs = request.app.state.video_jobs
    jobs.delete(video_id)
    return json_response({"id": video_id, "object": "video.deleted", "deleted": True})
