"""Run the image recipe: `python -m recipes.image train`, or one part on what it saved last."""

import argparse
import dataclasses

import torch

from recipes.image.export import export, load_exported
from recipes.image.grid import draw_grid
from recipes.image.plan import IMAGES, LOG, PLAN, ImagePlan
from recipes.image.plot import plot_curve
from recipes.image.report import write_report
from recipes.image.score import score_groups
from recipes.image.train import State, train

SCORED_PROMPTS = 200


def score_state(plan: ImagePlan) -> None:
    """Print the scores of the last saved state, also while training runs."""
    state = State.load(plan)
    print(f"{state.images} images", score_groups(state.averaged_model(plan), SCORED_PROMPTS, seed=1))


def act(action: str, plan: ImagePlan) -> None:
    """Do one part of the recipe."""
    match action:
        case "train":
            train(plan)
        case "export":
            export(State.load(plan), plan)
        case "score":
            score_state(plan)
        case "report":
            write_report(plan)
        case "grid":
            draw_grid(load_exported(plan), IMAGES / "tiny-image-samples.png")
        case "plot":
            plot_curve(LOG, IMAGES / "tiny-image-curve.png")


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m recipes.image", description=__doc__)
    parser.add_argument("action", choices=("train", "export", "score", "report", "grid", "plot"))
    parser.add_argument("--images", type=float, help="image budget, also of a resumed run")
    parser.add_argument("--cpu-seconds", type=float, help="budget of CPU time, also of a resumed run")
    parser.add_argument(
        "--warm-start", action="store_true", help="without a saved state, begin with the exported pipeline"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = PLAN
    if arguments.images:
        plan = dataclasses.replace(plan, image_budget=int(arguments.images))
    if arguments.cpu_seconds:
        plan = dataclasses.replace(plan, cpu_seconds_budget=arguments.cpu_seconds)
    if arguments.warm_start and not plan.state_path.exists():
        State.exported(plan).save(plan)
    act(arguments.action, plan)


if __name__ == "__main__":
    main()
