"""The estimate that a preview shows is the picture itself where the model's answer is the noise itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfumato.core.spec import TimestepSchedulerSpec
from sfumato.engine.build_image import LoadedPipeline
from sfumato.image.denoise import step
from sfumato.image.schedule import FLOW_SCHEDULERS, NOISE_SCHEDULERS, allowed_schedulers
from sfumato.image.stages import begin
from sfumato.image.state import COND, ImageState
from tests.image.drawing import spec_for

# LCM mixes a little of the sample into what it takes for the picture.
_TOLERANCES = {"LCMScheduler": 0.05}


def begun(loaded: LoadedPipeline, name: str) -> ImageState:
    """Return a state that has its timestep scheduler and nothing else."""
    if name not in allowed_schedulers(loaded.family.pipeline.scheduler):
        pytest.skip(f"{name} needs scipy, which is not installed")
    spec = spec_for(loaded, num_inference_steps=6, guidance_scale=1.0)
    from msgspec.structs import replace

    return begin(loaded.family, replace(spec, timestep_scheduler=TimestepSchedulerSpec(name=name)))


def estimate(loaded: LoadedPipeline, state: ImageState, noisy: Any, answer: Any) -> torch.Tensor:
    """Return the estimate behind one step."""
    from dataclasses import replace

    after = step(loaded.family, replace(state, latents=noisy), {COND: answer})
    assert after.estimate is not None
    assert after.latents is not None
    assert not torch.equal(after.estimate, after.latents)
    return after.estimate


def drawn(loaded: LoadedPipeline, state: ImageState) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a picture's latents and noise, f32[1, C, h, w]."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, *loaded.family.noise_shape(state.spec))
    picture = torch.rand(shape, generator=generator) - 0.5
    return picture, torch.randn(shape, generator=generator)


@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_noise_schedulers(sd15: LoadedPipeline, name: str) -> None:
    state = begun(sd15, name)
    picture, noise = drawn(sd15, state)
    noisy = state.timestep_scheduler.add_noise(picture, noise, state.timesteps[:1])
    found = estimate(sd15, state, noisy, noise)
    assert (found - picture).abs().max() <= _TOLERANCES.get(name, 0.02)


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_flow_schedulers(sd3: LoadedPipeline, name: str) -> None:
    state = begun(sd3, name)
    picture, noise = drawn(sd3, state)
    sigma = state.timestep.float() / 1000
    noisy = (1 - sigma) * picture + sigma * noise
    assert (estimate(sd3, state, noisy, noise - picture) - picture).abs().max() <= 0.02
