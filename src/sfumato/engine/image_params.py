"""Between people and image engines: parameters become a spec. No tensor, no model."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from sfumato.core.spec import ImageSpec, InputImage, ParameterValue, TimestepSchedulerSpec
from sfumato.core.traits import ImageTraits
from sfumato.engine.frontend import draw_seed
from sfumato.errors import NotSupported, RequestError


class ImageParams(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller may ask for; None takes the pipeline's default.

    n: images; image i has the random numbers of seed + i. shares_seed: all n images draw from one stream
    instead. scheduler: a class of diffusers' timestep schedulers, with scheduler_options. sigmas, timesteps:
    a schedule instead of num_inference_steps. strength: how far an `image` to start from is changed.
    class_labels: for models that draw classes. partial_images: pictures of the estimate on the way.
    """

    prompt: str = ""
    negative_prompt: str | None = None
    n: int = 1
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    guidance_scale_2: float | None = None
    guidance_rescale: float = 0.0
    cfg_truncation: float = 1.0
    cfg_normalization: float = 0.0
    eta: float = 0.0
    clip_skip: int | None = None
    max_sequence_length: int | None = None
    seed: int | None = None
    shares_seed: bool = False
    scheduler: str | None = None
    scheduler_options: dict[str, ParameterValue] = {}
    timesteps: tuple[int, ...] = ()
    sigmas: tuple[float, ...] = ()
    image: InputImage | None = None
    strength: float | None = None
    class_labels: tuple[int, ...] = ()
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    partial_images: int = 0

    def replaced(self, **changes: Any) -> ImageParams:
        """Return the same with some fields changed."""
        return msgspec.structs.replace(self, **changes)


_T = TypeVar("_T")
# How far an image to start from is changed where a request does not say.
DEFAULT_STRENGTH = 0.8


def make_image_spec(params: ImageParams, traits: ImageTraits) -> ImageSpec:
    """Combine a request's parameters with the pipeline's defaults. Raises RequestError."""
    if params.n < 1:
        raise RequestError(f"n is {params.n}, it must be at least 1", field="n", value=params.n, limit=1)
    if params.scheduler_options and params.scheduler is None:
        raise RequestError("scheduler options need a scheduler", field="scheduler")
    num_images = max(params.n, len(params.class_labels))
    seed = draw_seed() if params.seed is None else params.seed
    asked = params.scheduler
    return ImageSpec(
        prompts=(_prompt(params, traits),) * num_images,
        negative_prompts=None if params.negative_prompt is None else (params.negative_prompt,) * num_images,
        class_labels=_labels(params, traits),
        height=_or(params.height, _side(params, traits, "height")),
        width=_or(params.width, _side(params, traits, "width")),
        num_frames=_or(params.num_frames, traits.default_num_frames),
        num_inference_steps=_or(params.num_inference_steps, traits.default_steps),
        seeds=(seed,) if params.shares_seed else tuple(seed + number for number in range(num_images)),
        guidance_scale=_or(params.guidance_scale, traits.default_guidance_scale),
        true_cfg_scale=_or(params.true_cfg_scale, traits.default_true_cfg_scale),
        guidance_scale_2=params.guidance_scale_2,
        guidance_rescale=params.guidance_rescale,
        cfg_truncation=params.cfg_truncation,
        cfg_normalization=params.cfg_normalization,
        eta=params.eta,
        clip_skip=params.clip_skip,
        max_sequence_length=_or(params.max_sequence_length, traits.max_sequence_length),
        timestep_scheduler=None
        if asked is None
        else TimestepSchedulerSpec(name=asked, options=params.scheduler_options),
        timesteps=params.timesteps,
        sigmas=params.sigmas,
        image=params.image,
        strength=_strength(params),
        original_size=params.original_size,
        crops_coords_top_left=params.crops_coords_top_left,
        target_size=params.target_size,
        num_previews=params.partial_images,
    )


def _prompt(params: ImageParams, traits: ImageTraits) -> str:
    if traits.has_text and not params.prompt:
        raise RequestError("the prompt is empty", field="prompt", value=params.prompt)
    return params.prompt


def _labels(params: ImageParams, traits: ImageTraits) -> tuple[int, ...]:
    if not traits.num_classes:
        return params.class_labels
    if not params.class_labels:
        raise RequestError(
            f"class_labels are missing: this model draws classes 0 to {traits.num_classes - 1}",
            field="class_labels",
        )
    if params.n > 1 and len(params.class_labels) == 1:
        return params.class_labels * params.n
    if params.n > 1 and params.n != len(params.class_labels):
        raise NotSupported(
            f"n is {params.n} with {len(params.class_labels)} class labels; give n labels or one",
            field="n",
            value=params.n,
        )
    return params.class_labels


def _side(params: ImageParams, traits: ImageTraits, name: str) -> int:
    """Return the default of a side: the input image's, or the pipeline's."""
    if params.image is not None:
        return int(getattr(params.image, name))
    return int(getattr(traits, f"default_{name}"))


def _strength(params: ImageParams) -> float:
    if params.strength is not None:
        return params.strength
    return 1.0 if params.image is None else DEFAULT_STRENGTH


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value
