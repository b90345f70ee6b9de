"""What happens to a request before and after its denoise steps: functions from a state to a new one.

Components are read and never changed. N images, C channels of latents, H x W pixels.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.core.spec import ImageSpec, InputImage
from sfumato.image.families.protocol import Encode, Family
from sfumato.image.schedule import check_eta, clone, start_at
from sfumato.image.state import Generators, ImageState


def begin(family: Family, spec: ImageSpec) -> ImageState:
    """Plan a request's schedule on a clone of the pipeline's timestep scheduler; nothing is drawn yet.

    Raises RequestError where the scheduler's class refuses what was asked for.
    """
    scheduler = clone(family.pipeline.scheduler, spec)
    check_eta(scheduler, spec)
    family.plan_schedule(scheduler, spec)
    timesteps = scheduler.timesteps
    if spec.image is not None:
        timesteps = start_at(scheduler, spec)
    elif family.sets_begin_index and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return ImageState(
        spec=spec,
        generators=Generators.seeded(spec.seeds),
        timestep_scheduler=scheduler,
        timesteps=timesteps,
        conditioning={},
    )


def encode(family: Family, state: ImageState, encode_text: Encode) -> ImageState:
    """Encode text and image, and draw the initial latents: the draws come in the reference's order."""
    conditioning = family.conditioning(state.spec, encode_text)
    image = state.spec.image
    known = None if image is None else encode_image(family, image, state)
    return replace(state, conditioning=conditioning, latents=initial_latents(family, state, known))


def encode_image(family: Family, image: InputImage, state: ImageState) -> Tensor:
    """Return latents f32[N, C, h, w] of the image that a request starts from."""
    # A copy that shares the weights: some VAEs keep what they have seen on themselves.
    vae, processor = copy.copy(family.pipeline.vae), family.pipeline.image_processor
    pixels = np.frombuffer(image.pixels, np.float32).reshape(1, 3, image.height, image.width)
    given = processor.preprocess(torch.from_numpy(pixels.copy())).to(vae.device, vae.dtype)
    encoded = vae.encode(given.expand(state.num_images, -1, -1, -1))
    if not hasattr(encoded, "latent_dist"):
        latents = encoded.latents
    else:
        latents = _posterior_sample(encoded.latent_dist, state)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents.float() - shift) * vae.config.scaling_factor  # type: ignore[no-any-return]


def _posterior_sample(posterior: Any, state: ImageState) -> Tensor:
    noise = draw(state, tuple(posterior.mean.shape[1:])).to(posterior.mean)
    return posterior.mean + posterior.std * noise  # type: ignore[no-any-return]


def initial_latents(family: Family, state: ImageState, known: Tensor | None) -> Tensor:
    """Return the latents that the first step is given: noise, scaled, or an image with noise added."""
    scheduler = state.timestep_scheduler
    noise = draw(state, family.noise_shape(state.spec)).to(family.device)
    if known is None:
        return family.pack(noise * _initial_sigma(scheduler))
    first = state.timesteps[:1].repeat(state.num_images)
    known = known.to(noise)
    if hasattr(scheduler, "scale_noise"):
        return family.pack(scheduler.scale_noise(known, first, noise))
    return family.pack(scheduler.add_noise(known, noise, first))


def draw(state: ImageState, shape: tuple[int, ...]) -> Tensor:
    """Return f32[N, *shape] from the request's generators: one draw of N, or N draws of one."""
    each = state.generators.each
    num_images = state.num_images
    if len(each) == 1:
        return torch.randn((num_images, *shape), generator=each[0])
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in each])


def _initial_sigma(scheduler: Any) -> Any:
    """Read after `set_timesteps`: for some schedules it is not a fresh scheduler's value."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def decode(family: Family, latents: Tensor, spec: ImageSpec, vae: Any, *, num_together: int = 1) -> Tensor:
    """Return f32[N, F, 3, H, W] in 0..1; so many images at once, so that memory does not grow with N."""
    shaped = family.unpack(latents, spec)
    return torch.cat([family.decode(vae, some) for some in torch.split(shaped, num_together)]).cpu()
