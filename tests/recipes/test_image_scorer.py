"""The scorer accepts true renders and names what is wrong with all others."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from recipes.image.render import Placement, draw_layout, render
from recipes.image.scenes import COLORS, MIRRORED, SHAPES, Scene, Thing, draw_scene
from recipes.image.scorer import fault, read

PAIR = Scene((Thing("red", "circle", "large"), Thing("green", "square", "small")), "above", "white")
SINGLE = Scene((Thing("blue", "ring"),), None, "black")


def drawn(scene: Scene, seed: int = 0) -> Tensor:
    return render([scene], [draw_layout(random.Random(seed), scene)])[0]


def with_first(scene: Scene, **changes: str) -> Scene:
    return replace(scene, things=(replace(scene.things[0], **changes), *scene.things[1:]))


def drawn_scenes(num_scenes: int) -> list[Scene]:
    random_source = random.Random(7)
    return [draw_scene(random_source, 1 + i % 2) for i in range(num_scenes)]


def test_true_renders_are_right() -> None:
    for seed, scene in enumerate(drawn_scenes(120)):
        assert fault(drawn(scene, seed), scene) is None, scene.key


def test_true_renders_are_right_after_soft_noise_and_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed, scene in enumerate(drawn_scenes(60)):
        picture = drawn(scene, seed)
        noisy = picture + 0.04 * torch.randn(picture.shape, generator=generator)
        as_bytes = (noisy.clamp(0, 1) * 255).round() / 255
        assert fault(as_bytes, scene) is None, scene.key


@pytest.mark.parametrize("scene", [PAIR, SINGLE], ids=["pair", "single"])
def test_every_other_color_is_wrong(scene: Scene) -> None:
    for color in set(COLORS) - {scene.things[0].color}:
        assert fault(drawn(with_first(scene, color=color)), scene) == "object"


@pytest.mark.parametrize("scene", [PAIR, SINGLE], ids=["pair", "single"])
def test_every_other_shape_is_wrong(scene: Scene) -> None:
    for shape in set(SHAPES) - {scene.things[0].shape}:
        assert fault(drawn(with_first(scene, shape=shape)), scene) == "object"


def test_the_other_size_is_wrong() -> None:
    assert fault(drawn(with_first(PAIR, size="small")), PAIR) == "object"


def test_every_other_relation_is_wrong() -> None:
    for relation in set(MIRRORED) - {"above"}:
        for seed in range(5):
            assert fault(drawn(replace(PAIR, relation=relation), seed), PAIR) == "relation"


def test_swapped_colors_are_wrong() -> None:
    circle, square = PAIR.things
    swapped = (replace(circle, color=square.color), replace(square, color=circle.color))
    assert fault(drawn(replace(PAIR, things=swapped)), PAIR) == "object"


def test_without_a_relation_any_place_is_right() -> None:
    anywhere = replace(PAIR, relation=None)
    for relation in MIRRORED:
        assert fault(drawn(replace(PAIR, relation=relation)), anywhere) is None


def test_a_missing_and_an_extra_object_are_wrong() -> None:
    single = replace(PAIR, things=PAIR.things[:1], relation=None)
    assert fault(drawn(single), PAIR) == "count"
    assert fault(drawn(PAIR), single) == "count"


def test_another_background_is_wrong() -> None:
    assert fault(drawn(replace(PAIR, background="gray")), PAIR) == "background"


def test_a_plain_picture_shows_nothing() -> None:
    assert read(torch.ones(3, 32, 32)).found == ()


def test_noise_is_wrong() -> None:
    for seed in range(20):
        noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed))
        assert fault(noise, PAIR) is not None
        assert fault(noise, SINGLE) is not None


def test_a_two_colored_object_is_wrong() -> None:
    scene = Scene((Thing("red", "square", "large"),))
    layout = [(Placement(16, 16, 6.3),)]
    half_blue = render([scene], layout)[0]
    half_blue[:, :, 16:] = render([with_first(scene, color="blue")], layout)[0][:, :, 16:]
    assert fault(render([scene], layout)[0], scene) is None
    assert fault(half_blue, scene) == "object"


def test_a_shape_cut_in_half_is_wrong() -> None:
    scene = Scene((Thing("red", "circle", "large"),))
    picture = render([scene], [(Placement(16, 16, 6.3),)])[0]
    picture[:, :, 16:] = 1
    assert fault(picture, scene) is not None
