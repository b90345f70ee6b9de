"""The embedded pipeline: found by name, drawn offline, and right about as often as it is said to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recipes.image.scenes import draw_held_out_scenes
from recipes.image.scorer import fault
from recipes.image.wording import plain_prompt
from sfumato.core.messages import Picture
from sfumato.engine.image_engine import ImageEngine
from sfumato.models.folder import embedded_pipelines

NAME = "sfumato-tiny-image"
# Far below what docs/default-image-model.md reports, so that chance cannot fail it and a broken path does.
_ONE_OBJECT = 0.75


@pytest.fixture(scope="module")
def engine() -> ImageEngine:
    return ImageEngine.load(NAME, dtype="float32")


def pixels(picture: Picture) -> torch.Tensor:
    """Return f32[3, H, W] in 0..1."""
    levels = np.frombuffer(picture.pixels, np.uint8).reshape(picture.height, picture.width, 3)
    return torch.from_numpy(levels.copy()).permute(2, 0, 1).float() / 255


def test_it_is_embedded(engine: ImageEngine) -> None:
    assert embedded_pipelines() == [NAME]
    assert (engine.traits.default_height, engine.traits.default_width) == (32, 32)
    assert engine.traits.default_steps == 12


def test_held_out_prompts_are_drawn(engine: ImageEngine) -> None:
    scenes = draw_held_out_scenes(1, 24, seed=11)
    drawings = engine.draw([plain_prompt(scene) for scene in scenes], seed=1)
    right = [
        fault(pixels(drawing.pictures[0]), scene) is None
        for drawing, scene in zip(drawings, scenes, strict=True)
    ]
    assert sum(right) / len(right) >= _ONE_OBJECT


def test_the_prompt_matters(engine: ImageEngine) -> None:
    red, blue = engine.draw(["a large red square", "a large blue square"], seed=3)
    (red_mean, blue_mean) = (pixels(drawing.pictures[0]).mean((1, 2)) for drawing in (red, blue))
    assert red_mean[0] - red_mean[2] > blue_mean[0] - blue_mean[2] + 0.05
