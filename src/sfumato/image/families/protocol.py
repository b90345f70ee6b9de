"""What a model family knows: its text encoding, its rows, its guidance, its schedule and its latents.

N images of one request, B rows of one forward. An adapter holds the pipeline's components and changes none of
them; `pipeline.__call__` is never used.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.core.spec import ImageSpec
from sfumato.core.traits import ImageTraits
from sfumato.errors import RequestError
from sfumato.image.estimate import estimated
from sfumato.image.schedule import allowed_schedulers, plan
from sfumato.image.state import COND, UNCOND, ImageState, Inputs

# Encodes one text: the family's `encode_text` behind a cache.
Encode = Callable[[str], Inputs]


class Family(ABC):
    """One pipeline of a family; what most have in common is the default here.

    denoiser_name: the component that denoises. packed_area: latents per token where the adapter packs them.
    masks_text: rows whose texts differ in length may share a forward. sets_begin_index: as the pipeline does.
    default_steps, default_guidance, default_true_cfg: the pipeline's own. fields: what a request may say.
    """

    name: ClassVar[str]
    denoiser_name: ClassVar[str] = "transformer"
    masks_text: ClassVar[bool] = False
    sets_begin_index: ClassVar[bool] = False
    default_steps: ClassVar[int] = 50
    default_guidance: ClassVar[float] = 5.0
    default_true_cfg: ClassVar[float] = 1.0
    max_sequence_length: ClassVar[int] = 512
    takes_images: ClassVar[bool] = False
    is_video: ClassVar[bool] = False
    packed_area: ClassVar[int] = 1
    fields: ClassVar[frozenset[str]] = frozenset({"negative_prompt", "guidance_scale"})

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def denoiser(self) -> Any:
        """Return the model that denoises."""
        return getattr(self.pipeline, self.denoiser_name)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the denoiser's weights: diffusers looks through all of them each time."""
        return self.denoiser.dtype  # type: ignore[no-any-return]

    @cached_property
    def device(self) -> torch.device:
        """Return where the denoiser lies."""
        return self.denoiser.device  # type: ignore[no-any-return]

    @cached_property
    def vae_dtype(self) -> torch.dtype:
        """Return the dtype of the VAE's weights."""
        return self.pipeline.vae.dtype  # type: ignore[no-any-return]

    def with_own_tokenizers(self) -> Family:
        """Return the same with tokenizers that nobody else uses: they keep what they were last asked for."""
        pipeline = copy.copy(self.pipeline)
        for name, part in self.pipeline.components.items():
            if name.startswith("tokenizer") and part is not None:
                object.__setattr__(pipeline, name, copy.deepcopy(part))
        return type(self)(pipeline)

    def warm_up(self) -> None:
        """Encode one text, so that what encoders set up at their first call is there before a request."""
        height, width = self.default_size
        spec = ImageSpec(
            prompts=("",),
            height=height,
            width=width,
            num_inference_steps=1,
            seeds=(0,),
            guidance_scale=self.default_guidance,
            max_sequence_length=self.max_sequence_length,
        )
        self.encode_text("", spec)

    # What it declares.

    @property
    @abstractmethod
    def default_size(self) -> tuple[int, int]:
        """Return the height and width in pixels that a request gets that asks for none."""

    @property
    @abstractmethod
    def size_unit(self) -> int:
        """Return what height and width must be multiples of."""

    @property
    def vae_scale(self) -> int:
        """Return pixels per latent along an edge."""
        return int(self.pipeline.vae_scale_factor)

    def traits(self) -> ImageTraits:
        """Return what the front end may tell others."""
        height, width = self.default_size
        return ImageTraits(
            family=self.name,
            architecture=type(self.pipeline).__name__,
            default_height=height,
            default_width=width,
            size_unit=self.size_unit,
            default_steps=self.default_steps,
            default_guidance_scale=self.default_guidance,
            default_true_cfg_scale=self.default_true_cfg,
            fields=tuple(sorted(self.fields)),
            scheduler=type(self.pipeline.scheduler).__name__,
            schedulers=allowed_schedulers(self.pipeline.scheduler),
            takes_images=self.takes_images,
            is_video=self.is_video,
            max_sequence_length=self.max_sequence_length,
        )

    def check_size(self, spec: ImageSpec) -> None:
        """Raise RequestError, with sizes that can be drawn, for one that cannot."""
        for name, pixels in (("height", spec.height), ("width", spec.width)):
            multiple_of(pixels, self.size_unit, name)

    def check(self, spec: ImageSpec) -> None:  # noqa: B027
        """Raise RequestError for what only this family refuses."""

    # Text.

    @abstractmethod
    def encode_text(self, text: str, spec: ImageSpec) -> Inputs:
        """Return the inputs of one row, [1, ...]."""

    def text_key(self, spec: ImageSpec) -> tuple[Any, ...]:
        """Return what besides the text decides its encoding."""
        return (spec.max_sequence_length, spec.clip_skip)

    def is_guided(self, spec: ImageSpec) -> bool:
        """Whether there are unconditional rows at all."""
        return spec.guidance_scale > 1.0

    def conditioning(self, spec: ImageSpec, encode: Encode) -> dict[str, Inputs]:
        """Return the inputs of each branch, [N, ...]."""
        found = {COND: stacked([encode(text) for text in spec.prompts])}
        if self.is_guided(spec):
            found[UNCOND] = self.unconditional(spec, encode, found[COND])
        return found

    def unconditional(self, spec: ImageSpec, encode: Encode, cond: Inputs) -> Inputs:
        """Return the unconditional branch's inputs; no negative prompt is an empty one."""
        texts = spec.negative_prompts or ("",) * spec.num_images
        return stacked([encode(text) for text in texts])

    # Schedule and latents.

    def plan_schedule(self, scheduler: Any, spec: ImageSpec) -> None:
        """Set a clone's timesteps."""
        plan(scheduler, spec)

    @abstractmethod
    def noise_shape(self, spec: ImageSpec) -> tuple[int, ...]:
        """Return the shape of one image's noise as it is drawn."""

    def pack(self, latents: Tensor) -> Tensor:
        """Bring drawn noise [N, *noise_shape] into the shape that is stepped."""
        return latents

    def unpack(self, latents: Tensor, spec: ImageSpec) -> Tensor:
        """Bring stepped latents into the shape that the VAE decodes."""
        return latents

    def num_tokens(self, spec: ImageSpec) -> int:
        """Return how many positions one image has in the denoiser."""
        positions = math.prod(self.noise_shape(spec)[1:])
        patch = self.denoiser.config.get("patch_size", 1)
        area = math.prod(patch) if isinstance(patch, list | tuple) else patch * patch
        return max(1, positions // max(area, self.packed_area))

    # One step.

    def branches(self, state: ImageState) -> tuple[str, ...]:
        """Return the branches of the next step."""
        return (COND, UNCOND) if UNCOND in state.conditioning else (COND,)

    def expert(self, state: ImageState) -> str:
        """Return which of several denoisers the next step needs."""
        return self.denoiser_name

    def inputs(self, state: ImageState, branch: str) -> Inputs:
        """Return what a forward takes for one branch of one request, [N, ...]."""
        return {"sample": scaled(state), "timestep": self.times(state), **state.conditioning[branch]}

    def num_stepped(self, state: ImageState) -> int:
        """Return how many samples the timestep scheduler steps for one request."""
        return state.num_images

    def times(self, state: ImageState) -> Tensor:
        """Return the timesteps as the denoiser takes them, f32[N]."""
        return state.timestep.to(torch.float32).expand(state.num_images)

    @abstractmethod
    def forward(self, inputs: Inputs, expert: str) -> Tensor:
        """Return the denoiser's answers f32[B, ...] in the shape of the latents."""

    def combine(self, state: ImageState, outputs: dict[str, Tensor]) -> Tensor:
        """Return what the timestep scheduler is given, f32[N, ...]."""
        cond = outputs[COND]
        if UNCOND not in outputs:
            return cond
        return outputs[UNCOND] + state.spec.guidance_scale * (cond - outputs[UNCOND])

    def step(self, state: ImageState, noise_pred: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Let the request's timestep scheduler take its step; return new latents and the estimate."""
        assert state.latents is not None
        scheduler, latents = state.timestep_scheduler, state.latents
        result = scheduler.step(noise_pred, state.timestep, latents, **arguments)
        return result.prev_sample, estimated(scheduler, result, latents, noise_pred, state.timestep)

    # Pictures.

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Return f32[N, F, 3, H, W] in 0..1 of images' latents as `unpack` gave them."""
        config = vae.config
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return pictures(vae.decode(latents.to(self.vae_dtype), return_dict=False)[0])


def scaled(state: ImageState) -> Tensor:
    """Return the latents as the model takes them; along a flow that is as they are."""
    assert state.latents is not None
    scheduler = state.timestep_scheduler
    if not hasattr(scheduler, "scale_model_input"):
        return state.latents
    sample: Tensor = scheduler.scale_model_input(state.latents, state.timestep)
    return sample


def stacked(rows: Sequence[Inputs]) -> Inputs:
    """Join inputs along their first axis; lists are joined as lists."""
    first = rows[0]
    return {
        name: [item for row in rows for item in row[name]]
        if isinstance(value, list)
        else torch.cat([row[name] for row in rows])
        for name, value in first.items()
    }


def pictures(decoded: Tensor) -> Tensor:
    """Bring a VAE's f32[N, 3, H, W] in -1..1 to f32[N, 1, 3, H, W] in 0..1."""
    return (decoded.float() / 2 + 0.5).clamp(0, 1)[:, None]


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Shape [N] so that it multiplies [N, ...]."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


def shift_of(scheduler: Any, image_seq_len: int, *, max_shift: float = 1.15) -> float:
    """Return mu, linear in the number of image tokens between the configured ends."""
    config = scheduler.config
    base_len, max_len = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (high - low) / (max_len - base_len)
    return float(image_seq_len * slope + (low - slope * base_len))


def falling_sigmas(num_steps: int) -> list[float]:
    """Return sigmas from 1 to 1 / num_steps, evenly spaced."""
    import numpy as np

    return [float(sigma) for sigma in np.linspace(1.0, 1 / num_steps, num_steps)]


def multiple_of(pixels: int, unit: int, field: str) -> None:
    """Raise RequestError unless a size is a positive multiple of the unit."""
    if pixels < unit or pixels % unit:
        below = max(unit, pixels // unit * unit)
        raise RequestError(
            f"{field} {pixels} must be a multiple of {unit}, such as {below} or {below + unit}",
            field=field,
            value=pixels,
            limit=unit,
        )
