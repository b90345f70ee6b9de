"""Types of fields that requests for pictures and videos have."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from sfumato.core.spec import ParameterValue
from sfumato.serve.fields import INT64_MAX, Parameters, whole

# More is refused before anything is made of it; the engine has limits of its own.
_MAX_TOGETHER = 128
_MAX_STEPS = 1000
# OpenAI's limit.
_MAX_PROMPT = 32_000
_MAX_SIDE = 1 << 16
# Ten times the training steps of the published schedulers.
_MAX_OPTION = 10_000

Text = Annotated[str, Field(max_length=_MAX_PROMPT), AfterValidator(whole)]
Number = Annotated[int, Field(ge=1, le=_MAX_TOGETHER)]
ImageSeed = Annotated[int, Field(ge=0, le=INT64_MAX - _MAX_TOGETHER)]
Sigmas = Annotated[list[float], Field(max_length=_MAX_STEPS)]
_Small = Annotated[int, Field(ge=0, le=1 << 20)]
Timesteps = Annotated[list[_Small], Field(max_length=_MAX_STEPS)]
Labels = Annotated[list[_Small], Field(max_length=_MAX_TOGETHER)]
Pair = Annotated[list[_Small], Field(min_length=2, max_length=2)]
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


def _options(value: dict[str, ParameterValue] | None) -> dict[str, ParameterValue] | None:
    """Refuse numbers that would make a scheduler plan for more steps than memory holds."""
    for name, option in (value or {}).items():
        whole(name)
        if isinstance(option, str):
            whole(option)
        elif isinstance(option, int | float) and not abs(option) <= _MAX_OPTION:
            raise ValueError(f"{name} must be between -{_MAX_OPTION} and {_MAX_OPTION}")
    return value


class SchedulerChoice(BaseModel):
    """A timestep scheduler by name, with options."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, AfterValidator(whole)]
    options: Annotated[Parameters, AfterValidator(_options)] = None


def _scheduler(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


Scheduler = Annotated[SchedulerChoice | None, BeforeValidator(_scheduler)]


def size_text(width: int, height: int) -> str:
    """Return a size as requests and answers write it."""
    return f"{width}x{height}"
