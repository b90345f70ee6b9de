"""Own the grid of samples: one picture for each of some held-out prompts, with the scorer's verdict."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from recipes.image.model import Painter
from recipes.image.sample import sample
from recipes.image.scenes import draw_held_out_scenes
from recipes.image.scorer import fault
from recipes.image.wording import plain_prompt

COLUMNS, ROWS = 8, 4


def draw_grid(painter: Painter, path: Path, seed: int = 5) -> None:
    """Draw a row of held-out prompts of one object and more of two, without choosing among the results."""
    scenes = draw_held_out_scenes(1, COLUMNS, seed) + draw_held_out_scenes(2, COLUMNS * (ROWS - 1), seed)
    prompts = [plain_prompt(scene) for scene in scenes]
    pictures = sample(painter, prompts, seed=seed)
    figure, axes = pyplot.subplots(ROWS, COLUMNS, figsize=(1.5 * COLUMNS, 1.95 * ROWS))
    for axis, scene, prompt, picture in zip(axes.flat, scenes, prompts, pictures, strict=True):
        axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        wrong = fault(picture, scene)
        title = textwrap.fill(prompt, 24) + (f"\n(wrong: {wrong})" if wrong else "")
        axis.set_title(title, fontsize=6.5, color="firebrick" if wrong else "black")
        axis.set(xticks=[], yticks=[])
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
