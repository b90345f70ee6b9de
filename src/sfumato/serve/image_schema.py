"""What may stand in a request for a picture or a video: OpenAI's documented fields and ours."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from sfumato.core.traits import ImageTraits
from sfumato.engine.frontend import draw_seed
from sfumato.engine.image_params import ImageParams
from sfumato.errors import RequestError
from sfumato.serve.errors import bad_request
from sfumato.serve.fields import Count, Priority, neutral
from sfumato.serve.image_fields import (
    ImageSeed,
    Labels,
    Number,
    Pair,
    Scheduler,
    Sigmas,
    Size,
    Text,
    Timeout,
    Timesteps,
    size_text,
)
from sfumato.serve.pictures import MEDIA_TYPES
from sfumato.serve.schema import STRICT

FRAMES_PER_SECOND = 16

_NO_PARTS = "pictures are opaque and drawn as a whole"
_NO_KNOBS = "it has no counterpart in a diffusion pipeline; say it in the prompt, or by the steps"
_NO_GIF = "moving pictures are made by /v1/videos"
_NO_SVG = "pictures are made of pixels"


class DrawingRequest(BaseModel):
    """The fields that pictures and videos share; those behind `user` are ours, with diffusers' names."""

    model_config = STRICT

    # Fields of a form that are text whatever they look like.
    texts: ClassVar[frozenset[str]] = frozenset(
        {"prompt", "negative_prompt", "model", "user", "safety_identifier"}
    )

    prompt: Text | None = None
    model: str | None = None
    size: Size = None
    # Labels for whoever runs the server; they never change an answer.
    user: str | None = None
    safety_identifier: str | None = None

    negative_prompt: Text | None = None
    num_inference_steps: Count | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    guidance_scale_2: float | None = None
    guidance_rescale: float | None = None
    cfg_truncation: float | None = None
    cfg_normalization: float | None = None
    eta: float | None = None
    clip_skip: Count | None = None
    max_sequence_length: Count | None = None
    seed: ImageSeed | None = None
    scheduler: Scheduler = None
    timesteps: Timesteps | None = None
    sigmas: Sigmas | None = None
    priority: Priority | None = None
    timeout: Timeout | None = None

    # Names that the engine's parameters have too, and are passed on where they are given.
    _passed: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
        "num_inference_steps",
        "guidance_scale",
        "true_cfg_scale",
        "guidance_scale_2",
        "guidance_rescale",
        "cfg_truncation",
        "cfg_normalization",
        "eta",
        "clip_skip",
        "max_sequence_length",
    )
    _passed_lists: ClassVar[tuple[str, ...]] = ("timesteps", "sigmas")

    def params(self, traits: ImageTraits) -> ImageParams:
        """Return the engine's parameters, with a seed drawn where none is given. Raises RequestError."""
        given = {name: getattr(self, name) for name in self._passed}
        given |= {
            name: tuple(value) for name in self._passed_lists if (value := getattr(self, name)) is not None
        }
        if self.size is not None:
            given["width"], given["height"] = check_size(self.size, traits)
        if self.scheduler is not None:
            given["scheduler"] = self.scheduler.name
            given["scheduler_options"] = self.scheduler.options or {}
        given["seed"] = draw_seed() if self.seed is None else self.seed
        return ImageParams(**{name: value for name, value in given.items() if value is not None})


def check_size(size: tuple[int, int], traits: ImageTraits) -> tuple[int, int]:
    """Return a size that the family can do. Raises RequestError with those that it can."""
    unit = traits.size_unit
    default = (traits.default_width, traits.default_height)
    if traits.num_classes and size != default:
        # Its position embeddings are those of one size.
        raise RequestError(
            f"size {size_text(*size)}: this model draws {size_text(*default)} only",
            field="size",
            value=size_text(*size),
            limit=size_text(*default),
        )
    if all(side % unit == 0 for side in size):
        return size
    near = [max(unit, side // unit * unit) for side in size]
    raise RequestError(
        f"size {size_text(*size)}: this model draws sides that are multiples of {unit}, such as "
        f"{size_text(*near)}, {size_text(near[0] + unit, near[1] + unit)} or its default "
        f"{size_text(*default)}",
        field="size",
        value=size_text(*size),
        limit=unit,
    )


def _format(value: object) -> object:
    if value in ("gif", "svg"):
        raise PydanticCustomError(
            "unsupported",
            "{value}: {reason} (accepted: png, jpeg, webp)",
            {"value": value, "reason": _NO_GIF if value == "gif" else _NO_SVG},
        )
    return value


class PictureRequest(DrawingRequest):
    """The fields that drawing and editing share."""

    n: Number | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Annotated[Literal["png", "jpeg", "webp"] | None, BeforeValidator(_format)] = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=16)] | None = None
    background: Annotated[Any, neutral("auto", "opaque", reason=_NO_PARTS)] = None
    quality: Annotated[Any, neutral("auto", reason=_NO_KNOBS)] = None
    complexity: Annotated[Any, neutral(reason=_NO_KNOBS)] = None
    frame_count: Annotated[Any, neutral(reason=_NO_GIF)] = None
    frame_duration_ms: Annotated[Any, neutral(reason=_NO_GIF)] = None
    svg: Annotated[Any, neutral(reason=_NO_SVG)] = None

    strength: float | None = None
    shares_seed: bool | None = None
    class_labels: Labels | None = None
    original_size: Pair | None = None
    crops_coords_top_left: Pair | None = None
    target_size: Pair | None = None
    include_progress: bool | None = None

    _passed: ClassVar[tuple[str, ...]] = (
        *DrawingRequest._passed,
        "n",
        "strength",
        "shares_seed",
        "partial_images",
    )
    _passed_lists: ClassVar[tuple[str, ...]] = (
        *DrawingRequest._passed_lists,
        "class_labels",
        "original_size",
        "crops_coords_top_left",
        "target_size",
    )

    def check_answer(self) -> None:
        """Refuse what the form of the answer does not allow. Raises ApiError."""
        if self.output_compression not in (None, 100) and self.file_format == "png":
            raise bad_request(
                "output_compression is for jpeg and webp; png loses nothing", "output_compression"
            )
        if not self.stream:
            for name in ("partial_images", "include_progress"):
                if getattr(self, name):
                    raise bad_request(f"{name} needs stream: true", name)
            return
        num_pictures = max(self.n or 1, len(self.class_labels or ()))
        if num_pictures > 1:
            raise bad_request(f"n is {num_pictures}: a stream carries one picture; send n requests", "n")
        if self.response_format == "url":
            raise bad_request("a stream carries its pictures as b64_json, never as url", "response_format")

    @property
    def file_format(self) -> str:
        """Return what the pictures are encoded as."""
        return self.output_format or "png"

    @property
    def media_type(self) -> str:
        """Return the type of the encoded pictures."""
        return MEDIA_TYPES[self.file_format]


class GenerateRequest(PictureRequest):
    """Body of /v1/images/generations."""

    # Nothing is moderated here.
    moderation: Literal["auto", "low"] | None = None
    style: Annotated[Any, neutral(reason=_NO_KNOBS)] = None


class EditRequest(PictureRequest):
    """Fields of the form of /v1/images/edits, without its file."""

    mask: Annotated[Any, neutral(reason="only whole pictures are edited")] = None
    markup: Annotated[Any, neutral(reason="only whole pictures are edited")] = None
    input_fidelity: Annotated[Any, neutral(reason="say it by strength")] = None


def _seconds(value: object) -> object:
    """A number, or one written as a string, as OpenAI's is."""
    if value is None:
        return None
    try:
        seconds = float(value) if isinstance(value, str | int | float) and value is not True else 0.0
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 600:
        raise ValueError("expected a number of seconds above 0 and at most 600")
    return seconds


Seconds = Annotated[Any, BeforeValidator(_seconds)]


class VideoRequest(DrawingRequest):
    """Body of /v1/videos."""

    seconds: Seconds = None
    input_reference: Annotated[Any, neutral(reason="videos are made from text alone")] = None
    num_frames: Count | None = None

    def params(self, traits: ImageTraits) -> ImageParams:
        """Return the engine's parameters. Raises ApiError for seconds and frames together."""
        if self.seconds is not None and self.num_frames is not None:
            raise bad_request("seconds and num_frames exclude each other", "seconds")
        num_frames = self.num_frames
        if self.seconds is not None:
            unit = traits.frames_unit
            num_frames = max(1, round(self.seconds * FRAMES_PER_SECOND / unit)) * unit + 1
        return super().params(traits).replaced(num_frames=num_frames)
