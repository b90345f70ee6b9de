"""Own the trial of the scorer: its verdicts on true renders and on pictures with one known fault."""

import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from recipes.image.render import draw_layout, render
from recipes.image.scenes import BACKGROUNDS, COLORS, MIRRORED, SHAPES, SIZES, Scene, draw_scene
from recipes.image.scorer import fault

# Standard deviation of the noise on every picture of the trial, in [0, 1]; a sampler leaves about as much.
NOISE = 0.02


def _other(random_source: random.Random, options: tuple[str, ...], current: str | None) -> str:
    return random_source.choice([option for option in options if option != current])


def _change_thing(field: str, options: tuple[str, ...]) -> Callable[[Scene, random.Random], Scene | None]:
    def change(scene: Scene, random_source: random.Random) -> Scene | None:
        things = list(scene.things)
        index = random_source.randrange(len(things))
        current = getattr(things[index], field)
        if current is None:
            return None
        things[index] = replace(things[index], **{field: _other(random_source, options, current)})
        # Changed into the other object's twin, the pair could be read either way.
        return replace(scene, things=tuple(things))

    return change


def _swap_relation(scene: Scene, random_source: random.Random) -> Scene | None:
    if scene.relation is None:
        return None
    return replace(scene, relation=_other(random_source, tuple(MIRRORED), scene.relation))


def _lose_thing(scene: Scene, random_source: random.Random) -> Scene | None:
    if len(scene.things) == 1:
        return None
    return replace(scene, things=(random_source.choice(scene.things),), relation=None)


def _add_thing(scene: Scene, random_source: random.Random) -> Scene | None:
    if len(scene.things) == 2:
        return None
    extra = draw_scene(random_source, 1).things[0]
    return replace(scene, things=(*scene.things, extra), relation=random_source.choice(tuple(MIRRORED)))


def _change_background(scene: Scene, random_source: random.Random) -> Scene:
    return replace(scene, background=_other(random_source, tuple(BACKGROUNDS), scene.background))


CHANGES: dict[str, Callable[[Scene, random.Random], Scene | None]] = {
    "none": lambda scene, _: scene,
    "wrong color": _change_thing("color", tuple(COLORS)),
    "wrong shape": _change_thing("shape", SHAPES),
    "wrong size": _change_thing("size", SIZES),
    "wrong relation": _swap_relation,
    "missing object": _lose_thing,
    "extra object": _add_thing,
    "wrong background": _change_background,
}


def try_scorer(num_pictures: int, seed: int = 0) -> dict[str, dict[str, int]]:
    """Return for each change, and for pure noise, how many pictures there were and how many were accepted."""
    random_source = random.Random(f"trial {seed}")
    generator = torch.Generator().manual_seed(seed)
    verdicts = {}
    for name, change in CHANGES.items():
        accepted = tried = 0
        while tried < num_pictures:
            scene = draw_scene(random_source, random_source.choice((1, 2)))
            shown = change(scene, random_source)
            if shown is None:
                continue
            picture = render([shown], [draw_layout(random_source, shown)])[0]
            picture = picture + NOISE * torch.randn(picture.shape, generator=generator)
            accepted += fault(picture.clamp(0, 1), scene) is None
            tried += 1
        verdicts[name] = {"pictures": tried, "accepted": accepted}
    noises: list[Tensor] = [torch.rand(3, 32, 32, generator=generator) for _ in range(num_pictures)]
    asked = [draw_scene(random_source, random_source.choice((1, 2))) for _ in noises]
    accepted = sum(fault(noise, scene) is None for noise, scene in zip(noises, asked, strict=True))
    verdicts["noise"] = {"pictures": num_pictures, "accepted": accepted}
    return verdicts
