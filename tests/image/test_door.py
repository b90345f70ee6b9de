"""What can never be drawn is refused with the field, the value and the limit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sfumato.config import EngineConfig
from sfumato.core.spec import InputImage, TextSpec
from sfumato.engine.build_image import LoadedPipeline
from sfumato.engine.engine import Engine
from sfumato.engine.image_engine import ImageEngine
from sfumato.errors import CheckpointError, ConfigError, NotSupported, RequestError
from sfumato.image.door import ImageDoor
from sfumato.image.families.registry import check_pipeline
from tests.goldens.images import load_case_pipeline
from tests.image.conftest import pipeline_folder
from tests.image.drawing import pixels, run, spec_for, start


def picture(height: int = 32, width: int = 32) -> InputImage:
    """Return a grey picture."""
    return InputImage(
        pixels=np.full((3, height, width), 0.5, np.float32).tobytes(), height=height, width=width
    )


@pytest.mark.parametrize(
    ("asked", "field", "says"),
    [
        ({"height": 34}, "height", "must be a multiple of 4, such as 32 or 36"),
        ({"height": 33}, "height", "such as 32 or 36"),
        ({"width": 0}, "width", "such as 4 or 8"),
        ({"num_inference_steps": 0}, "num_inference_steps", "between 1 and 1000"),
        ({"n": 17}, "n", "between 1 and 16"),
        ({"n": 0}, "n", "at least 1"),
        ({"guidance_scale": -1.0}, "guidance_scale", "between 0.0 and 100.0"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale", "not known to stable-diffusion"),
        ({"cfg_truncation": 0.5}, "cfg_truncation", "it knows clip_skip"),
        ({"num_frames": 5}, "num_frames", "not known to stable-diffusion"),
        ({"class_labels": (3,)}, "class_labels", "not known to stable-diffusion"),
        ({"strength": 0.5}, "strength", "needs an image"),
        ({"image": picture(), "strength": 0.1}, "strength", "leaves no step to run"),
        ({"image": picture(64, 32), "height": 32}, "size", "the image is 32x64, asked for were 32x32"),
        ({"seed": -1}, "seed", "between 0 and"),
        ({"prompt": ""}, "prompt", "is empty"),
        ({"scheduler": "Karras"}, "scheduler", "is not one of DDIMScheduler"),
        ({"scheduler": "DDIMScheduler", "scheduler_options": {"colour": 1}}, "scheduler", "has no option"),
        ({"scheduler_options": {"eta": 1}}, "scheduler", "need a scheduler"),
        ({"scheduler": "DDIMScheduler", "sigmas": (1.0, 0.5)}, "sigmas", "takes no sigmas"),
        ({"timesteps": (900, 500), "sigmas": (1.0, 0.5)}, "sigmas", "exclude each other"),
        ({"partial_images": 17}, "partial_images", "between 0 and 16"),
        ({"eta": 2.0}, "eta", "between 0.0 and 1.0"),
        ({"eta": 0.5}, "eta", "not known to EulerDiscreteScheduler"),
        ({"max_sequence_length": 50}, "max_sequence_length", "not known to stable-diffusion"),
    ],
)
def test_bad_requests(sd15: LoadedPipeline, asked: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as raised:
        let_in(sd15, asked)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("name", "asked", "field", "says"),
    [
        ("qwen-image", {"guidance_scale": 5.0}, "guidance_scale", "not known to qwen-image"),
        (
            "qwen-image",
            {"true_cfg_scale": 3.0, "negative_prompt": None},
            "true_cfg_scale",
            "needs a negative",
        ),
        ("flux", {"true_cfg_scale": 3.0, "negative_prompt": None}, "true_cfg_scale", "needs a negative"),
        ("dit", {"prompt": "a cat"}, "prompt", "draws classes"),
        ("dit", {"class_labels": (1000,)}, "class_labels", "between 0 and 999"),
        ("dit", {"height": 64}, "height", "draws 32 pixels only"),
        ("dit", {"class_labels": ()}, "class_labels", "are missing"),
        ("dit", {"negative_prompt": "blurry"}, "negative_prompt", "not known to dit"),
        ("wan", {"num_frames": 6}, "num_frames", "such as 5 or 9"),
        ("wan", {"guidance_scale_2": 3.0}, "guidance_scale_2", "needs a pipeline with two denoisers"),
        ("z-image", {"image": picture()}, "image", "starts from no image"),
    ],
)
def test_what_only_a_family_refuses(name: str, asked: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as raised:
        let_in(load_case_pipeline(pipeline_folder(name)), asked)
    assert raised.value.field == field


def let_in(loaded: LoadedPipeline, asked: dict[str, Any]) -> None:
    """Go through the door as a submission does."""
    ImageDoor(loaded.family, max_latent_bytes=1 << 20, max_rows=32)("id", spec_for(loaded, **asked))


def test_a_refused_schedule_is_answered_and_harms_nobody(sd15: LoadedPipeline) -> None:
    engine = start(sd15)
    good = engine.add_request(spec_for(sd15))
    bad = engine.add_request(spec_for(sd15, scheduler="DDIMScheduler", sigmas=(1.0, 0.5)))
    refused, ended = [], []
    while engine.has_work:
        for turn in engine.step():
            refused += [refusal.request_id for refusal in turn.refusals]
            ended += [output.request_id for output in turn.outputs if output.finish_reason is not None]
    assert (refused, ended) == ([bad], [good])


def test_a_request_that_fits_no_step(sd15: LoadedPipeline) -> None:
    with pytest.raises(RequestError, match="are more than a step's 4096"):
        start(sd15, limits={"max_latent_bytes": 4096}).add_request(spec_for(sd15, height=64))
    with pytest.raises(RequestError, match="n 3 makes 6 rows, a step has 4"):
        start(sd15, limits={"max_step_rows": 4}).add_request(spec_for(sd15, n=3))


def test_text_is_not_for_image_engines(sd15: LoadedPipeline) -> None:
    door = ImageDoor(sd15.family, max_latent_bytes=1 << 20, max_rows=8)
    text = TextSpec(prompt_ids=(1,), max_tokens=1, block_length=4, decoding=None)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="draws images"):
        door.check(text)


def test_sd3_knows_only_flows(sd3: LoadedPipeline) -> None:
    with pytest.raises(NotSupported, match="is not one of DPMSolverMultistepScheduler, FlowMatchEuler"):
        let_in(sd3, {"scheduler": "DDIMScheduler"})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("SkyReelsV2DiffusionForcingPipeline", "denoises video causally"),
        ("PixArtAlphaPipeline", "supported are StableDiffusionPipeline"),
    ],
)
def test_other_pipelines_are_refused_by_name(name: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} .*{says}|{name}.*{says}"):
        check_pipeline(name, "a-model")


def test_rows_of_the_deterministic_mode() -> None:
    for rows in (1, 2, 4, 8, 12):
        EngineConfig(model="m", deterministic_rows=rows).check()
    for rows in (3, 6, 7):
        with pytest.raises(ConfigError, match=f"--deterministic-rows {rows} must be 1, 2 or a multiple of 4"):
            EngineConfig(model="m", deterministic_rows=rows).check()


def test_layers_that_cannot_be_skipped(sd15: LoadedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(sd15.family), "can_skip", False)
    with pytest.raises(NotSupported, match="cannot skip layers") as raised:
        let_in(sd15, {"clip_skip": 1})
    assert raised.value.field == "clip_skip"


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_layers_that_are_skipped_change_the_picture(name: str) -> None:
    loaded = load_case_pipeline(pipeline_folder(name))
    plain, skipped = run(start(loaded), [spec_for(loaded), spec_for(loaded, clip_skip=1)])
    assert pixels(plain) != pixels(skipped)


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel": 2},
        {"algorithm": "llada"},
        {"block_length": 4},
        {"page_size": 4},
        {"mask_token_id": 4},
        {"context_length": 64},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_language_models(sd15: LoadedPipeline, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is for language models"):
        ImageEngine.load(sd15.path, **options)


def test_options_of_image_models() -> None:
    with pytest.raises(ConfigError, match="--deterministic-rows 4 is for images"):
        Engine.load("sfumato-tiny-sdar", deterministic_rows=4)
    with pytest.raises(CheckpointError, match="is no pipeline of components"):
        ImageEngine.load("sfumato-tiny-sdar")
