"""Variants of families without a golden, made from tiny pipelines and compared with diffusers' own loops."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.config import EngineConfig
from sfumato.core.spec import ImageSpec
from sfumato.engine.build_image import LoadedPipeline, load_pipeline
from tests.goldens.images import load_case_pipeline
from tests.image.conftest import pipeline_folder
from tests.image.drawing import PROMPT, pixels, run, spec_for, start


def reloaded(pipeline: Any, folder: Path) -> LoadedPipeline:
    """Write a pipeline as its users would have it, and load it as they would."""
    pipeline.save_pretrained(folder)
    return load_pipeline(EngineConfig(model=str(folder), dtype="float32"), folder, "cpu")


def by_diffusers(loaded: LoadedPipeline, spec: ImageSpec, **options: Any) -> np.ndarray:
    """Return the levels [F, H, W, 3] of the pipeline's own loop."""
    pipeline = copy.copy(loaded.family.pipeline)
    pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        result = pipeline(
            prompt=PROMPT,
            negative_prompt="blurry",
            height=spec.height,
            width=spec.width,
            num_inference_steps=spec.num_inference_steps,
            guidance_scale=spec.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(spec.seeds[0]),
            output_type="np",
            **options,
        )
    levels: np.ndarray = np.round((result.frames[0] if loaded.traits.is_video else result.images) * 255)
    return levels


def assert_alike(found: list[bytes], expected: np.ndarray) -> None:
    """At most one level on 99.9 % of the bytes."""
    (drawn,) = found
    levels = np.frombuffer(drawn, np.uint8).reshape(expected.shape).astype(int)
    assert (np.abs(levels - expected) <= 1).mean() >= 0.999


@pytest.fixture
def wan_2_2(tmp_path: Path) -> LoadedPipeline:
    """Return Wan with a denoiser for high noise and another for low."""
    from diffusers import WanPipeline

    loaded = load_case_pipeline(pipeline_folder("wan"))
    parts = dict(loaded.family.pipeline.components)
    second = copy.deepcopy(parts["transformer"])
    for parameter in second.parameters():
        parameter.data.mul_(1.5)
    return reloaded(WanPipeline(**{**parts, "transformer_2": second}, boundary_ratio=0.6), tmp_path)


@pytest.mark.parametrize("second_scale", [None, 1.0, 2.5])
def test_two_denoisers_take_their_steps(wan_2_2: LoadedPipeline, second_scale: float | None) -> None:
    asked = {"guidance_scale": 4.0, "guidance_scale_2": second_scale, "num_inference_steps": 6}
    spec = spec_for(wan_2_2, **asked)
    expected = by_diffusers(
        wan_2_2,
        spec,
        guidance_scale_2=second_scale,
        num_frames=5,
        max_sequence_length=spec.max_sequence_length,
    )
    others = [spec_for(wan_2_2, num_inference_steps=steps, seed=steps) for steps in (3, 5)]
    engine = start(wan_2_2)
    experts: set[str] = set()
    family = wan_2_2.family
    forward = family.forward

    def seen(inputs: Any, expert: str) -> torch.Tensor:
        experts.add(expert)
        return forward(inputs, expert)

    family.forward = seen  # type: ignore[method-assign]
    assert_alike(pixels(run(engine, [spec, *others])[0]), expected)
    assert experts == {"transformer", "transformer_2"}


@pytest.fixture
def distilled(tmp_path: Path) -> LoadedPipeline:
    """Return Stable Diffusion with a UNet that is told its guidance, as consistency models are."""
    from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    loaded = load_case_pipeline(pipeline_folder("sd15"))
    parts = dict(loaded.family.pipeline.components)
    torch.manual_seed(0)
    config = {key: value for key, value in parts["unet"].config.items() if not key.startswith("_")}
    unet = UNet2DConditionModel(**{**config, "time_cond_proj_dim": 32}).eval()
    scheduler = LCMScheduler.from_config(parts["scheduler"].config, clip_sample=False)
    made = StableDiffusionPipeline(
        **{**parts, "unet": unet, "scheduler": scheduler}, requires_safety_checker=False
    )
    return reloaded(made, tmp_path)


@pytest.mark.parametrize("scale", [1.5, 7.5])
def test_a_distilled_denoiser_is_told_its_guidance(distilled: LoadedPipeline, scale: float) -> None:
    spec = spec_for(distilled, guidance_scale=scale, num_inference_steps=4)
    others = [spec_for(distilled, guidance_scale=3.0, num_inference_steps=2, seed=5)]
    found = run(start(distilled), [spec, *others])
    assert_alike(pixels(found[0]), by_diffusers(distilled, spec))
    # One row a step: there is no unconditional branch.
    assert found[0][-1].usage.nfe == 4


@pytest.fixture
def velocity(tmp_path: Path) -> LoadedPipeline:
    """Return Stable Diffusion whose answers are velocities, as those of its version 2 are."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    parts = dict(load_case_pipeline(pipeline_folder("sd15")).family.pipeline.components)
    scheduler = DDIMScheduler.from_config(
        parts["scheduler"].config,
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    made = StableDiffusionPipeline(**{**parts, "scheduler": scheduler}, requires_safety_checker=False)
    return reloaded(made, tmp_path)


@pytest.mark.parametrize("asked", [None, "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_answers_may_be_velocities(velocity: LoadedPipeline, asked: str | None) -> None:
    import diffusers

    spec = spec_for(velocity, guidance_scale=5.0, guidance_rescale=0.7, scheduler=asked)
    others = [spec_for(velocity, num_inference_steps=2, seed=5)]
    found = pixels(run(start(velocity), [spec, *others])[0])
    if asked is not None:
        pipeline = velocity.family.pipeline
        pipeline.scheduler = getattr(diffusers, asked).from_config(pipeline.scheduler.config)
    assert_alike(found, by_diffusers(velocity, spec, guidance_rescale=0.7))
