"""Own the pictures: layouts drawn by lot for scenes, and anti-aliased renders of a whole batch at once.

B: pictures, N: objects per picture (absent ones have radius 0), S: side in pixels.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.image.scenes import BACKGROUNDS, COLORS, MIRRORED, SHAPES, Scene

SIDE = 32
MAX_THINGS = 2
# Radius in pixels: small and large leave a gap, so that a scorer can tell them apart.
RADII = {"small": (3.8, 4.6), "large": (5.8, 6.6), None: (3.8, 6.6)}
# Two objects keep this many clear pixels along the axis of their relation.
SMALLEST_GAP = 2.5
BORDER = 0.5
SQUARE_HALF_SIDE = 0.88
CROSS_HALF_WIDTH = 0.36
RING_HOLE = 0.5


@dataclass(frozen=True)
class Placement:
    """Where one object lies: centre and radius in pixels, y downwards."""

    x: float
    y: float
    radius: float


def draw_layout(random_source: random.Random, scene: Scene) -> tuple[Placement, ...]:
    """Draw radii and centres that make the scene true."""
    radii = [random_source.uniform(*RADII[thing.size]) for thing in scene.things]
    if len(radii) == 1:
        low, high = radii[0] + BORDER, SIDE - BORDER - radii[0]
        return (Placement(random_source.uniform(low, high), random_source.uniform(low, high), radii[0]),)
    relation = scene.relation or random_source.choice(tuple(MIRRORED))
    # The axis runs downwards or to the right, so the first along it is the one above or left.
    order = (0, 1) if relation in ("above", "left of") else (1, 0)
    along = _draw_along(random_source, radii[order[0]], radii[order[1]])
    across = _draw_across(random_source, max(radii))
    placements: list[Placement] = [Placement(0, 0, 0)] * 2
    for place, index in enumerate(order):
        x, y = across[place], along[place]
        if relation in ("left of", "right of"):
            x, y = y, x
        placements[index] = Placement(x, y, radii[index])
    return tuple(placements)


def _draw_along(random_source: random.Random, first: float, second: float) -> tuple[float, float]:
    room = SIDE - 2 * BORDER - 2 * first - 2 * second - SMALLEST_GAP
    cuts = sorted((random_source.random(), random_source.random()))
    start, gap = cuts[0] * room, (cuts[1] - cuts[0]) * room
    near = BORDER + start + first
    return near, near + first + SMALLEST_GAP + gap + second


def _draw_across(random_source: random.Random, radius: float) -> tuple[float, float]:
    low, high = BORDER + radius, SIDE - BORDER - radius
    middle = random_source.uniform(low, high)
    # Less than half of the smallest distance along the axis, so that the relation is never in doubt.
    first, second = (min(high, max(low, middle + random_source.uniform(-1.5, 1.5))) for _ in range(2))
    return first, second


def coverage(x: Tensor, y: Tensor, radius: Tensor, side: int = SIDE) -> Tensor:
    """Return how much of each pixel each shape would cover, f32[..., len(SHAPES), S, S] in [0, 1].

    x, y, radius: f32[...]. Coverage is 0.5 minus the signed distance to the outline, cut to [0, 1].
    """
    grid = torch.arange(side) + 0.5
    dx = grid.view(1, side) - x[..., None, None]
    dy = grid.view(side, 1) - y[..., None, None]
    r = radius[..., None, None]
    across, down = dx.abs(), dy.abs()
    away = (dx.square() + dy.square()).sqrt()
    circle = away - r
    square = torch.maximum(across, down) - SQUARE_HALF_SIDE * r
    # Isosceles, base 2r at y + 0.8r, tip at y - r; the sides lean by (base half) / (height).
    slope = (1 / 1.8, (1 + (1 / 1.8) ** 2) ** 0.5)
    triangle = torch.maximum((across - slope[0] * (dy + r)) / slope[1], dy - 0.8 * r)
    bar, pole = (torch.maximum(a - r, b - CROSS_HALF_WIDTH * r) for a, b in ((across, down), (down, across)))
    cross = torch.minimum(bar, pole)
    ring = torch.maximum(circle, RING_HOLE * r - away)
    distances = torch.stack((circle, square, triangle, cross, ring), dim=-3)
    return (0.5 - distances).clamp(0, 1)


def render(scenes: list[Scene], layouts: list[tuple[Placement, ...]], side: int = SIDE) -> Tensor:
    """Paint scenes at given layouts; returns f32[B, 3, S, S] in [0, 1]."""
    absent = Placement(0.0, 0.0, 0.0)
    filled = [(*layout, *[absent] * (MAX_THINGS - len(layout))) for layout in layouts]
    places = torch.tensor([[(p.x, p.y, p.radius) for p in layout] for layout in filled])
    shapes = torch.zeros(len(scenes), MAX_THINGS, dtype=torch.long)
    colors = torch.zeros(len(scenes), MAX_THINGS, 3)
    for row, scene in enumerate(scenes):
        for column, thing in enumerate(scene.things):
            shapes[row, column] = SHAPES.index(thing.shape)
            colors[row, column] = torch.tensor(COLORS[thing.color])
    grounds = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32)
    x, y, radius = places.unbind(-1)
    alphas = coverage(x, y, radius, side)
    picked = alphas.gather(2, shapes[..., None, None, None].expand(-1, -1, 1, side, side))
    picked = picked * (radius > 0)[..., None, None, None]
    image = (grounds / 255)[:, :, None, None].expand(-1, 3, side, side)
    for column in range(MAX_THINGS):
        image = torch.lerp(image, (colors[:, column] / 255)[..., None, None], picked[:, column])
    return image
