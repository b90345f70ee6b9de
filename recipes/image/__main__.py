"""Run the image recipe: `python -m recipes.image train`, or one part on what it saved last."""

import argparse
import dataclasses

import torch

from recipes.image.export import export, load_exported
from recipes.image.grid import draw_grid
from recipes.image.plan import IMAGES, LOG, PLAN
from recipes.image.plot import plot_curve
from recipes.image.report import write_report
from recipes.image.train import State, train

ACTIONS = ("train", "export", "score", "grid", "plot")


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m recipes.image", description=__doc__)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--images", type=float, help="image budget, also of a resumed run")
    parser.add_argument("--cpu-seconds", type=float, help="budget of CPU time, also of a resumed run")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = PLAN
    if arguments.images:
        plan = dataclasses.replace(plan, image_budget=int(arguments.images))
    if arguments.cpu_seconds:
        plan = dataclasses.replace(plan, cpu_seconds_budget=arguments.cpu_seconds)
    actions = {
        "train": lambda: train(plan),
        "export": lambda: export(State.load(plan), plan),
        "score": lambda: write_report(plan),
        "grid": lambda: draw_grid(load_exported(plan), IMAGES / "tiny-image-samples.png"),
        "plot": lambda: plot_curve(LOG, IMAGES / "tiny-image-curve.png"),
    }
    actions[arguments.action]()


if __name__ == "__main__":
    main()
