"""Videos that are made while nobody waits: what became of each, kept for a while, within a bound."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sfumato.core.messages import Picture
from sfumato.errors import SfumatoError
from sfumato.serve.drawing import Drawing
from sfumato.serve.errors import ApiError, as_api_error, failed
from sfumato.serve.image_fields import size_text
from sfumato.serve.image_schema import FRAMES_PER_SECOND
from sfumato.serve.movies import encode_video
from sfumato.serve.pictures import encode_picture
from sfumato.serve.provenance import request_of

# As long as pictures' urls last.
_SECONDS = 3600.0
_MAX_JOBS = 256
_MAX_BYTES = 1 << 30
_QUEUED, _RUNNING, _COMPLETED, _FAILED = "queued", "in_progress", "completed", "failed"


@dataclass(slots=True)
class VideoJob:
    """One video, from its acceptance until it is deleted or forgotten; content: MP4, thumbnail: WebP."""

    drawing: Drawing
    status: str = _QUEUED
    progress: int = 0
    error: ApiError | None = None
    ended_at: float | None = None
    content: bytes = b""
    thumbnail: bytes = b""

    @property
    def id(self) -> str:
        """Return what it is asked for by."""
        return self.drawing.call.id

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will change."""
        return self.ended_at is not None

    @property
    def num_bytes(self) -> int:
        """Return what it holds in memory."""
        return len(self.content) + len(self.thumbnail)

    async def run(self) -> None:
        """Make the video; whatever goes wrong fails this job, and nothing else."""
        try:
            picture = await self._picture()
            self.content, self.thumbnail = await asyncio.to_thread(self._encode, picture)
            self.status, self.progress = _COMPLETED, 100
        except (ApiError, SfumatoError) as error:
            self.status, self.error = _FAILED, as_api_error(error)
        except Exception as error:  # an encoder raises what it likes
            self.status, self.error = _FAILED, failed(f"the video cannot be encoded: {error}")
        finally:
            self.ended_at = time.time()
            self.drawing.close()

    async def _picture(self) -> Picture:
        found: list[Picture] = []
        async for output in self.drawing.news():
            self.status = _RUNNING
            if output.step is not None:
                # The last percent is the decoding, and the file's.
                self.progress = max(self.progress, 99 * output.step.done // output.step.total)
            found += output.pictures
        return found[0]

    def _encode(self, picture: Picture) -> tuple[bytes, bytes]:
        call = self.drawing.call
        scheduler = call.model.image_traits.scheduler
        request = request_of(call.model.name, call.params, self.drawing.spec, 0, scheduler=scheduler)
        video = encode_video(picture, frames_per_second=FRAMES_PER_SECOND, request=request)
        return video, encode_picture(picture, output_format="webp", request=request)

    def describe(self) -> dict[str, Any]:
        """Return OpenAI's video object with what repeats it beside it."""
        call, spec = self.drawing.call, self.drawing.spec
        ended_at = None if self.ended_at is None else int(self.ended_at)
        error = self.error
        return {
            "id": self.id,
            "object": "video",
            "model": call.model.name,
            "status": self.status,
            "progress": self.progress,
            "created_at": call.created,
            "completed_at": ended_at if self.status == _COMPLETED else None,
            "expires_at": None if ended_at is None else ended_at + int(_SECONDS),
            "prompt": call.params.prompt,
            "size": size_text(spec.width, spec.height),
            "seconds": f"{spec.num_frames / FRAMES_PER_SECOND:g}",
            "remixed_from_video_id": None,
            "error": None if error is None else {"code": error.code or error.kind, "message": error.message},
            "num_frames": spec.num_frames,
            "frames_per_second": FRAMES_PER_SECOND,
            "seed": call.params.seed,
            "usage": self.drawing.usage_field(),
        }


class VideoJobs:
    """All jobs in the order of their creation; ended ones go when they are too many, too large or too old."""

    def __init__(
        self,
        *,
        max_jobs: int = _MAX_JOBS,
        max_bytes: int = _MAX_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._clock = clock
        self._jobs: dict[str, VideoJob] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def check_room(self) -> None:
        """Raise ApiError where every place is taken by a video that is still being made."""
        self._tidy()
        if sum(not job.has_ended for job in self._jobs.values()) >= self._max_jobs:
            message = f"{self._max_jobs} videos are being made; delete one or try again later"
            raise ApiError(429, message, kind="rate_limit_error", code="too_many_videos")

    def add(self, drawing: Drawing) -> VideoJob:
        """Begin a job."""
        job = VideoJob(drawing)
        self._jobs[job.id] = job
        task = asyncio.create_task(job.run())
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job.id, None))
        self._tidy()
        return job

    def find(self, name: str) -> VideoJob:
        """Return a job. Raises ApiError 404."""
        self._tidy()
        job = self._jobs.get(name)
        if job is None:
            message = f"no video {name!r}; it may have been deleted or expired"
            raise ApiError(
                404, message, kind="invalid_request_error", param="video_id", code="video_not_found"
            )
        return job

    def newest(self) -> list[VideoJob]:
        """Return all jobs, the newest first."""
        self._tidy()
        return list(reversed(self._jobs.values()))

    def delete(self, name: str) -> None:
        """Forget a job, and end its request if it has not ended. Raises ApiError 404."""
        job = self.find(name)
        del self._jobs[name]
        job.drawing.close()
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()

    def _tidy(self) -> None:
        now = self._clock()
        ended = [(job, job.ended_at) for job in self._jobs.values() if job.ended_at is not None]
        num_bytes = sum(job.num_bytes for job, _ in ended)
        for job, ended_at in ended:
            is_old = now - ended_at >= _SECONDS
            is_over = num_bytes > self._max_bytes or len(self._jobs) > self._max_jobs
            # The newest is kept whatever its size.
            if is_old or (is_over and job is not ended[-1][0]):
                del self._jobs[job.id]
                num_bytes -= job.num_bytes
