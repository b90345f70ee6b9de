"""The denoise state of one image request: plain tensors and objects that nobody else holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.core.spec import ImageSpec

# What a denoiser is given besides sample and timestep, by argument name: [N, ...] for the N images of one
# request, or lists of N where lengths differ.
Inputs = dict[str, Any]

COND, UNCOND = "cond", "uncond"


@dataclass(slots=True)
class Generators:
    """A request's random streams: one for all of its images, or one each; they pickle with their position."""

    each: tuple[torch.Generator, ...]

    @classmethod
    def seeded(cls, seeds: tuple[int, ...]) -> Generators:
        """Return CPU generators, so that a seed means the same on every device."""
        return cls(tuple(torch.Generator("cpu").manual_seed(seed) for seed in seeds))

    def argument(self, num_images: int) -> torch.Generator | list[torch.Generator]:
        """Return them as diffusers takes them for so many samples; two halves draw one after the other."""
        if len(self.each) == 1:
            return self.each[0]
        return list(self.each) * (num_images // len(self.each))

    def __getstate__(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.each]

    def __setstate__(self, states: list[Tensor]) -> None:
        self.each = tuple(torch.Generator("cpu") for _ in states)
        for generator, state in zip(self.each, states, strict=True):
            generator.set_state(state)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageState:
    """Where one request stands. N images; stages return a new state.

    The timestep scheduler and the generators are this request's own and advance with it; all else is never
    changed. conditioning: by branch, empty until the prompt is encoded. latents: f32[N, ...] as the family
    steps them. step: how many of `timesteps` are done. noise_pred: what the last step gave to the timestep
    scheduler. estimate: the images that it would end at, as latents. images: f32[N, F, 3, H, W] in 0..1.
    """

    spec: ImageSpec
    generators: Generators
    timestep_scheduler: Any
    timesteps: Tensor
    conditioning: dict[str, Inputs]
    latents: Tensor | None = None
    step: int = 0
    noise_pred: Tensor | None = None
    estimate: Tensor | None = None
    images: Tensor | None = None

    @property
    def num_images(self) -> int:
        """Return how many images the request makes together."""
        return self.spec.num_images

    @property
    def num_steps(self) -> int:
        """Return how many denoise steps there are in all."""
        return len(self.timesteps)

    @property
    def timestep(self) -> Tensor:
        """Return the next step's timestep, a scalar."""
        return self.timesteps[self.step]

    @property
    def is_encoded(self) -> bool:
        """Whether the first denoise step can run."""
        return self.latents is not None

    @property
    def is_denoised(self) -> bool:
        """Whether all denoise steps are done."""
        return self.step >= self.num_steps
