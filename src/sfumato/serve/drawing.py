"""One API call that draws: its spec on the engine, what comes back of it, and what it cost."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from sfumato.core.messages import FinishReason, Output, Picture, Submit, Usage
from sfumato.core.spec import ImageSpec
from sfumato.engine.image_params import ImageParams, make_image_spec
from sfumato.engine.outputs import Outputs
from sfumato.errors import RequestError
from sfumato.serve.errors import ApiError, bad_request, failed, timed_out, unavailable
from sfumato.serve.metrics import Metrics
from sfumato.serve.registry import ServedModel

# The engine knows sides; here they came as a size.
_ASKED_AS = {"height": "size", "width": "size"}


@dataclass(frozen=True, slots=True)
class DrawCall:
    """What identifies one API call that draws, and what it asks for; the seed of its params is drawn."""

    id: str
    endpoint: str
    model: ServedModel
    params: ImageParams
    created: int
    priority: int = 0
    timeout: float | None = None

    @classmethod
    def of(
        cls,
        model: ServedModel,
        params: ImageParams,
        *,
        endpoint: str,
        prefix: str,
        priority: int | None,
        timeout: float | None,
    ) -> DrawCall:
        """Return a new call with an id of its own."""
        name = f"{prefix}_{secrets.token_hex(12)}"
        return cls(name, endpoint, model, params, int(time.time()), priority or 0, timeout)


@dataclass(slots=True)
class Drawing:
    """One call on the engine; whoever holds it must close it."""

    call: DrawCall
    spec: ImageSpec
    metrics: Metrics
    outputs: Outputs
    usage: Usage = Usage()
    started: float = field(default_factory=time.monotonic)
    _is_open: bool = True
    _has_begun: bool = False
    _has_preview: bool = False

    @classmethod
    async def start(cls, call: DrawCall, metrics: Metrics) -> Drawing:
        """Submit the call and wait until the engine has accepted it. Raises ApiError or EngineError."""
        model = call.model
        try:
            spec = make_image_spec(call.params, model.image_traits)
            submission = Submit(request_id=call.id, spec=spec, priority=call.priority, timeout=call.timeout)
            outputs = await model.client.submit([submission])
        except RequestError as error:
            metrics.requests.labels(model.name, call.endpoint, "refused").inc()
            raise bad_request(str(error), _ASKED_AS.get(error.field, error.field)) from error
        return cls(call, spec, metrics, outputs)

    async def news(self) -> AsyncIterator[Output]:
        """Yield progress, previews and pictures as they come.

        Raises ApiError if the request fails.
        """
        async for output in self.outputs:
            self.usage = output.usage
            self._observe(output)
            if output.finish_reason is not None:
                self._end(output.finish_reason)
                if output.finish_reason is not FinishReason.STOP:
                    raise self._as_error(output)
            yield output

    def _observe(self, output: Output) -> None:
        name = self.call.model.name
        if not self._has_begun and output.queue_seconds is not None:
            self._has_begun = True
            self.metrics.queue_seconds.labels(name).observe(output.queue_seconds)
        for picture in output.pictures:
            if not picture.is_preview:
                self.metrics.pictures.labels(name, self.call.endpoint).inc()
                continue
            if not self._has_preview:
                self._has_preview = True
                self.metrics.first_preview_seconds.labels(name).observe(time.monotonic() - self.started)
            self.metrics.previews.labels(name).inc()

    def _end(self, end: str) -> None:
        self._is_open = False
        seconds = time.monotonic() - self.started
        self.metrics.observe_drawn(self.call.model.name, self.call.endpoint, end, self.usage, seconds)

    def _as_error(self, output: Output) -> ApiError:
        match output.finish_reason:
            case FinishReason.TIMEOUT:
                return timed_out(self.call.timeout)
            case FinishReason.ABORT:
                return unavailable("the server is shutting down; the request was ended")
        if self.call.model.client.is_gone:
            return unavailable(output.error or "the engine is gone")
        return failed(output.error or "the request failed in the engine")

    def close(self) -> None:
        """Abort the request if it has not ended."""
        self.outputs.close()
        if self._is_open:
            self._end(FinishReason.ABORT)

    def usage_field(self) -> dict[str, Any]:
        """Return OpenAI's usage, whose tokens diffusion models do not have, with ours beside it."""
        return {
            "input_tokens": 0,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
            "output_tokens": 0,
            "total_tokens": 0,
            "denoise_steps": self.usage.denoise_steps,
            "nfe": self.usage.nfe,
        }


async def collect_pictures(drawing: Drawing) -> list[Picture]:
    """Run a call to its end and return its pictures in order. Raises ApiError."""
    found: list[Picture] = []
    async for output in drawing.news():
        found += [picture for picture in output.pictures if not picture.is_preview]
    return sorted(found, key=lambda picture: picture.index)
