"""Run a recipe: `python -m recipes sdar` trains (or resumes), exports, scores and plots one tiny model."""

import argparse
import dataclasses

import torch

from recipes.export import export
from recipes.plan import LOGS, PLANS, Plan
from recipes.plot import plot_curve
from recipes.score import write_scores
from recipes.train import Lesson, State, data_lesson, train

ACTIONS = (*PLANS, "export", "score", "plot", "compare")


def lesson_of(plan: Plan) -> Lesson:
    """Return what the plan's model learns from."""
    if plan.distillation is None:
        return data_lesson(plan)
    # The package is needed here alone: the other models are trained without it.
    from recipes.distil import student_lesson

    return student_lesson(plan)


def compare_with_teacher(plan: Plan) -> None:
    """Measure a student and its teacher under all decoding rules, into recipes/logs/<name>-tradeoff.json."""
    from recipes.tradeoff import POINTS, compare

    assert plan.distillation is not None
    models = [PLANS[plan.distillation.teacher].model_name, plan.model_name]
    compare(models, POINTS, LOGS / f"{plan.name}-tradeoff.json")


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m recipes", description=__doc__)
    parser.add_argument("action", choices=ACTIONS, help="a model's name does everything")
    parser.add_argument("model", nargs="?", choices=tuple(PLANS), help="for the other actions")
    parser.add_argument("--tokens", type=float, help="token budget, also of a resumed run")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = arguments.action if arguments.action in PLANS else arguments.model
    if name is None:
        parser.error(f"{arguments.action} needs a model: {', '.join(PLANS)}")
    plan = PLANS[name]
    if arguments.tokens:
        plan = dataclasses.replace(plan, token_budget=int(arguments.tokens))
    if arguments.action == name:
        export(train(plan, lesson_of(plan)), plan)
    if arguments.action == "export":
        export(State.load(plan.state_path), plan)
    if arguments.action in (name, "score"):
        write_scores(plan)
    if arguments.action in (name, "plot"):
        plot_curve(plan)
    if arguments.action == "compare":
        if plan.distillation is None:
            parser.error(f"{name} has no teacher to compare it with")
        compare_with_teacher(plan)


if __name__ == "__main__":
    main()
