"""Types of fields that requests for pictures and videos have."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sfumato.serve.fields import INT64_MAX, Parameters

# More is refused before anything is made of it; the engine has limits of its own.
_MAX_TOGETHER = 128
_MAX_STEPS = 1000
# OpenAI's limit.
_MAX_PROMPT = 32_000
_MAX_SIDE = 1 << 16

Text = Annotated[str, Field(max_length=_MAX_PROMPT)]
Number = Annotated[int, Field(ge=1, le=_MAX_TOGETHER)]
ImageSeed = Annotated[int, Field(ge=0, le=INT64_MAX - _MAX_TOGETHER)]
Sigmas = Annotated[list[float], Field(max_length=_MAX_STEPS)]
Timesteps = Annotated[list[int], Field(max_length=_MAX_STEPS)]
Labels = Annotated[list[int], Field(max_length=_MAX_TOGETHER)]
Pair = Annotated[list[int], Field(min_length=2, max_length=2)]
Timeout = Annotated[float, Field(gt=0, le=1e9)]


def _size(value: object) -> object:
    """WIDTHxHEIGHT as (width, height); null and auto choose nothing."""
    if value is None or value == "auto":
        return None
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", value) if isinstance(value, str) else None
    if found is None:
        raise ValueError("expected WIDTHxHEIGHT in pixels, such as 512x512, or auto")
    width, height = int(found[1]), int(found[2])
    if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
        raise ValueError(f"a side must have 1 to {_MAX_SIDE} pixels")
    return width, height


Size = Annotated[Any, BeforeValidator(_size)]


class SchedulerChoice(BaseModel):
    """A timestep scheduler by name, with options."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    options: Parameters = None


def _scheduler(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


Scheduler = Annotated[SchedulerChoice | None, BeforeValidator(_scheduler)]


def size_text(width: int, height: int) -> str:
    """Return a size as requests and answers write it."""
    return f"{width}x{height}"
