"""Own the picture of the learning curve."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

LABELS = {"one_object": "one object", "two_objects": "two objects"}


def plot_curve(log: Path, path: Path) -> None:
    """Draw the share of held-out prompts drawn right against training images."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    images = [line["images"] / 1e6 for line in lines]
    figure, axis = pyplot.subplots(figsize=(6, 3.4))
    for group, label in LABELS.items():
        scores = [line["scores"][group] for line in lines]
        axis.plot(images, [100 * score["correct"] / score["prompts"] for score in scores], "o-", label=label)
    axis.set(xlabel="million training images", ylabel="held-out prompts drawn right, %", ylim=(0, 102))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
