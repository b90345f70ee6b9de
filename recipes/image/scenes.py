"""Own the scenes: what can be on a picture, how one is drawn by lot, and which are held out from training."""

import random
import zlib
from dataclasses import dataclass, replace

# One scene in eight is never used for training; prompts for scoring are drawn from these alone.
HELD_OUT_ONE_IN = 8

# Objects and backgrounds, sRGB in bytes; every two are at least 80 apart, so that the nearest is no guess.
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (50, 80, 220),
    "yellow": (245, 215, 50),
    "orange": (245, 135, 25),
    "purple": (135, 50, 170),
    "cyan": (70, 205, 225),
    "pink": (245, 140, 190),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}
DEFAULT_BACKGROUND = "white"
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = ("small", "large")

# The relation that a scene is stored with, and the one that says the same from the other object.
MIRRORED = {"above": "below", "left of": "right of", "below": "above", "right of": "left of"}
CANONICAL_RELATIONS = ("above", "left of")


@dataclass(frozen=True)
class Thing:
    """One object; `size` is None where the prompt leaves it open."""

    color: str
    shape: str
    size: str | None = None

    def describe(self) -> str:
        """Return the words without an article, such as `small red circle`."""
        return " ".join(word for word in (self.size, self.color, self.shape) if word)


@dataclass(frozen=True)
class Scene:
    """One object, or two of which the first is `relation` the second (None: anywhere)."""

    things: tuple[Thing, ...]
    relation: str | None = None
    background: str = DEFAULT_BACKGROUND

    def canonical(self) -> "Scene":
        """Return the scene that all descriptions of the same picture share."""
        if len(self.things) == 2 and self.relation is None:
            return replace(self, things=tuple(sorted(self.things, key=Thing.describe)))
        if self.relation and self.relation not in CANONICAL_RELATIONS:
            return replace(self, things=self.things[::-1], relation=MIRRORED[self.relation])
        return self

    @property
    def key(self) -> str:
        """Return the canonical words that the held-out rule looks at."""
        scene = self.canonical()
        things = ",".join(thing.describe() for thing in scene.things)
        return f"{things}:{scene.relation}:{scene.background}"


def is_held_out(scene: Scene) -> bool:
    """Tell whether a scene is kept from training, by CRC-32 of its key modulo 8."""
    return zlib.crc32(scene.key.encode()) % HELD_OUT_ONE_IN == 0


def _draw_thing(random_source: random.Random, size_share: float) -> Thing:
    size = random_source.choice(SIZES) if random_source.random() < size_share else None
    return Thing(random_source.choice(tuple(COLORS)), random_source.choice(SHAPES), size)


def draw_scene(random_source: random.Random, num_things: int) -> Scene:
    """Draw any scene of one or two objects, held out or not; two objects are never alike."""
    background = DEFAULT_BACKGROUND
    if random_source.random() < 0.4:
        background = random_source.choice(tuple(BACKGROUNDS))
    if num_things == 1:
        return Scene((_draw_thing(random_source, 0.5),), background=background)
    things = (_draw_thing(random_source, 0.25), _draw_thing(random_source, 0.25))
    while (things[0].color, things[0].shape) == (things[1].color, things[1].shape):
        things = (things[0], _draw_thing(random_source, 0.25))
    relation = random_source.choice((*MIRRORED, *MIRRORED, None))
    return Scene(things, relation, background)


def draw_training_scene(random_source: random.Random, pair_share: float = 0.65) -> Scene:
    """Draw a scene of one or two objects that is not held out."""
    num_things = 2 if random_source.random() < pair_share else 1
    while is_held_out(scene := draw_scene(random_source, num_things)):
        pass
    return scene


def draw_held_out_scenes(num_things: int, num_scenes: int, seed: int) -> list[Scene]:
    """Draw held-out scenes; of one object there are few, so that they repeat."""
    random_source = random.Random(f"held out {num_things} {seed}")
    scenes: list[Scene] = []
    while len(scenes) < num_scenes:
        scene = draw_scene(random_source, num_things)
        if is_held_out(scene):
            scenes.append(scene)
    return scenes
