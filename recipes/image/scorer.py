"""Own the reading of pictures: what is on one, and whether that is the scene asked for; nothing is learned.

Colours by the nearest palette entry, objects by connected components, shapes by their overlap with ideal ones
of the same area and centre, relations by centres. B: pictures, S: side, K: shapes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from recipes.image.render import RADII, coverage
from recipes.image.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, Thing

# Colour distances are Euclidean with channels in [0, 1].
BACKGROUND_TOLERANCE = 0.25
OBJECT_CONTRAST = 0.25
COLOR_TOLERANCE = 0.3
# The share of an object's pixels, from the one most unlike the background, that tell its colour.
CORE_CONTRAST = 0.8
# Components of fewer covered pixels are specks, which nobody sees at this size.
SMALLEST_OBJECT = 4.0
SMALLEST_OVERLAP = 0.72
# Mean colour error that is left after an object of one colour on its background is explained.
LARGEST_RESIDUAL = 0.12
SIZE_BOUNDARY = (RADII["small"][1] + RADII["large"][0]) / 2
# Centres must differ by this many pixels, and more along the relation's axis than across it.
SMALLEST_OFFSET = 3.0


@dataclass(frozen=True)
class Found:
    """One object as read from a picture; `shape` and `color` are None where nothing fits."""

    color: str | None
    shape: str | None
    radius: float
    x: float
    y: float

    def is_(self, thing: Thing) -> bool:
        """Tell whether this is the object asked for."""
        if (self.color, self.shape) != (thing.color, thing.shape):
            return False
        return thing.size is None or (self.radius > SIZE_BOUNDARY) == (thing.size == "large")


@dataclass(frozen=True)
class Reading:
    """What a picture shows; `background` is None where no palette entry fits."""

    background: str | None
    found: tuple[Found, ...]


def read(picture: Tensor) -> Reading:
    """Read one picture, f32[3, S, S] in [0, 1]."""
    edge = torch.cat((picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]), dim=1)
    background = _nearest(edge.median(dim=1).values, BACKGROUNDS, BACKGROUND_TOLERANCE)
    if background is None:
        return Reading(None, ())
    ground = _channels(BACKGROUNDS[background])
    contrast = (picture - ground.view(3, 1, 1)).norm(dim=0)
    labels = label_components(contrast > OBJECT_CONTRAST)
    found = (_read_object(picture, ground, contrast, labels, int(n)) for n in labels.unique() if n > 0)
    return Reading(background, tuple(one for one in found if one is not None))


def label_components(mask: Tensor) -> Tensor:
    """Number the 8-connected components of bool[S, S]; returns i64[S, S], 0 outside."""
    S = mask.shape[-1]
    labels = torch.arange(1, S * S + 1, dtype=torch.float32).view(1, 1, S, S) * mask
    while True:
        grown = functional.max_pool2d(labels, 3, stride=1, padding=1) * mask
        if torch.equal(grown, labels):
            return labels[0, 0].long()
        labels = grown


def _read_object(
    picture: Tensor, ground: Tensor, contrast: Tensor, labels: Tensor, label: int
) -> Found | None:
    own = labels == label
    strongest = contrast[own].max()
    core = own & (contrast >= CORE_CONTRAST * strongest)
    color = _nearest(picture[:, core].median(dim=1).values, COLORS, COLOR_TOLERANCE)
    # Faint pixels around the component belong to its soft outline, unless another object has them.
    near = functional.max_pool2d(own[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
    region = near & (own | (labels == 0))
    direction = (_channels(COLORS[color]) if color else picture[:, core].mean(dim=1)) - ground
    offset = picture - ground.view(3, 1, 1)
    alpha = (torch.einsum("chw,c->hw", offset, direction) / direction.square().sum()).clamp(0, 1) * region
    area = alpha.sum()
    if area < SMALLEST_OBJECT:
        return None
    residual = (offset - alpha * direction.view(3, 1, 1)).norm(dim=0)[region].mean()
    x, y = _center(alpha)
    shape, radius = _fit_shape(alpha, area, x, y)
    is_clean = float(residual) <= LARGEST_RESIDUAL
    return Found(color if is_clean else None, shape, radius, float(x), float(y))


def _fit_shape(alpha: Tensor, area: Tensor, x: Tensor, y: Tensor) -> tuple[str | None, float]:
    """Return the ideal shape that overlaps best with coverage f32[S, S], and its radius.

    Ideal shapes have the object's area and centre; overlap is the smaller coverage over the larger one.
    """
    S = alpha.shape[-1]
    units = coverage(torch.tensor(S / 2), torch.tensor(S / 2), torch.tensor(S / 4), S)
    unit_areas = units.sum(dim=(-2, -1)) / (S / 4) ** 2
    radii = (area / unit_areas).sqrt()
    drops = torch.tensor([(float(_center(unit)[1]) - S / 2) / (S / 4) for unit in units])
    ideals = torch.stack(
        [
            coverage(x, y - drop * radius, radius, S)[k]
            for k, (radius, drop) in enumerate(zip(radii, drops, strict=True))
        ]
    )
    overlaps = torch.minimum(ideals, alpha).sum(dim=(-2, -1)) / torch.maximum(ideals, alpha).sum(dim=(-2, -1))
    best = int(overlaps.argmax())
    return (SHAPES[best] if overlaps[best] >= SMALLEST_OVERLAP else None), float(radii[best])


def _center(alpha: Tensor) -> tuple[Tensor, Tensor]:
    grid = torch.arange(alpha.shape[-1]) + 0.5
    total = alpha.sum()
    return (alpha.sum(dim=0) * grid).sum() / total, (alpha.sum(dim=1) * grid).sum() / total


def _channels(color: tuple[int, int, int]) -> Tensor:
    return torch.tensor(color) / 255


def _nearest(color: Tensor, palette: dict[str, tuple[int, int, int]], tolerance: float) -> str | None:
    distances = {name: float((color - _channels(entry)).norm()) for name, entry in palette.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= tolerance else None


def fault(picture: Tensor, scene: Scene) -> str | None:
    """Name the first thing wrong with a picture of a scene, None if nothing is.

    One of `background`, `count`, `object` (a wrong colour, shape or size, or nothing that could be told) and
    `relation`. picture: f32[3, S, S] in [0, 1].
    """
    reading = read(picture)
    if reading.background != scene.background:
        return "background"
    if len(reading.found) != len(scene.things):
        return "count"
    orders = (reading.found, reading.found[::-1])
    fitting = [order for order in orders if all(f.is_(t) for f, t in zip(order, scene.things, strict=True))]
    if not fitting:
        return "object"
    if scene.relation and not any(_holds(scene.relation, *order) for order in fitting):
        return "relation"
    return None


def _holds(relation: str, first: Found, second: Found) -> bool:
    right, down = second.x - first.x, second.y - first.y
    along, across = (down, right) if relation in ("above", "below") else (right, down)
    if relation in ("below", "right of"):
        along = -along
    return along >= SMALLEST_OFFSET and along > abs(across)
