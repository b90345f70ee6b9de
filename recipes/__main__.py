"""Run a recipe: `python -m recipes sdar` trains (or resumes), exports, scores and plots one tiny model."""

import argparse
import dataclasses

import torch

from recipes.export import export
from recipes.plan import PLANS
from recipes.plot import plot_curve
from recipes.score import write_scores
from recipes.train import State, train

ACTIONS = ("sdar", "llada", "export", "score", "plot")


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m recipes", description=__doc__)
    parser.add_argument("action", choices=ACTIONS, help="a model's name does everything")
    parser.add_argument("model", nargs="?", choices=tuple(PLANS), help="for export, score and plot")
    parser.add_argument("--tokens", type=float, help="token budget, also of a resumed run")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = arguments.action if arguments.action in PLANS else arguments.model
    if name is None:
        parser.error(f"{arguments.action} needs a model: {' or '.join(PLANS)}")
    plan = PLANS[name]
    if arguments.tokens:
        plan = dataclasses.replace(plan, token_budget=int(arguments.tokens))
    state = train(plan) if arguments.action in PLANS else State.load(plan.state_path)
    if arguments.action in (name, "export"):
        export(state, plan)
    if arguments.action in (name, "score"):
        write_scores(plan)
    if arguments.action in (name, "plot"):
        plot_curve(plan)


if __name__ == "__main__":
    main()
