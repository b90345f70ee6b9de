"""Run the image recipe: `python -m recipes.image train`, or one part on what it saved last."""

import argparse
import dataclasses

import torch

from recipes.image.plan import PLAN


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m recipes.image", description=__doc__)
    parser.add_argument("action", choices=("train", "export", "score", "grid", "plot"))
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
    if arguments.action == "train":
        from recipes.image.train import train

        train(plan)
    elif arguments.action == "export":
        from recipes.image.export import export
        from recipes.image.train import State

        export(State.load(plan), plan)


if __name__ == "__main__":
    main()
