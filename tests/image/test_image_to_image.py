"""Starting from an image, against diffusers' own pipelines of each family."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.core.spec import InputImage
from sfumato.engine.build_image import LoadedPipeline
from tests.goldens.images import load_case_pipeline
from tests.image.conftest import pipeline_folder
from tests.image.drawing import PROMPT, pixels, run, spec_for, start


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("sd15", "StableDiffusionImg2ImgPipeline"),
        ("sd3", "StableDiffusion3Img2ImgPipeline"),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
        ("flux", "FluxImg2ImgPipeline"),
    ],
)
def test_it_draws_what_diffusers_draws(name: str, class_name: str) -> None:
    import diffusers

    loaded = load_case_pipeline(pipeline_folder(name))
    reference = getattr(diffusers, class_name)(**_components(loaded, class_name))
    reference.set_progress_bar_config(disable=True)
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(3))
    given = {"num_inference_steps": 6, "strength": 0.5, "guidance_scale": 3.0}
    with torch.no_grad():
        expected = reference(
            prompt=PROMPT,
            image=image,
            generator=torch.Generator("cpu").manual_seed(1),
            output_type="np",
            **given,
            **({"height": 32, "width": 32} if name == "flux" else {}),
            **({"max_sequence_length": 64} if "max_sequence_length" in loaded.traits.fields else {}),
        ).images[0]
    spec = spec_for(
        loaded,
        negative_prompt=None,
        image=InputImage(pixels=image.numpy().tobytes(), height=32, width=32),
        **given,
    )
    found = np.frombuffer(pixels(run(start(loaded), [spec])[0])[0], np.uint8).reshape(32, 32, 3)
    close = np.abs(found.astype(int) - np.round(expected * 255).astype(int)) <= 1
    assert close.mean() >= 0.999


def _components(loaded: LoadedPipeline, class_name: str) -> dict[str, object]:
    """Return the pipeline's components; the reference gets a timestep scheduler of its own."""
    pipeline = loaded.family.pipeline
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    extra = {"requires_safety_checker": False} if class_name == "StableDiffusionImg2ImgPipeline" else {}
    return {**pipeline.components, "scheduler": scheduler, **extra}


def test_fewer_steps_with_less_strength(sd15: LoadedPipeline) -> None:
    image = InputImage(pixels=np.zeros((3, 32, 32), np.float32).tobytes(), height=32, width=32)
    outputs = run(start(sd15), [spec_for(sd15, image=image, strength=0.5, num_inference_steps=8)])[0]
    assert outputs[-1].usage.denoise_steps == 4
