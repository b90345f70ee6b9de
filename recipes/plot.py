"""Own the picture of a learning curve."""

import json

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from recipes.plan import IMAGES, LOGS, Plan

LABELS = {
    "word_problem_1": "word problems, one step",
    "word_problem_2": "word problems, two steps",
    "extraction": "extraction",
    "rewriting": "rewriting",
}


def plot_curve(plan: Plan) -> None:
    """Draw exact answers and tokens per forward against training tokens."""
    lines = [json.loads(line) for line in (LOGS / f"{plan.name}.jsonl").read_text().splitlines()]
    tokens = [line["tokens"] / 1e6 for line in lines]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for group, label in LABELS.items():
        for rule, style in (("one_token", "-"), ("threshold", ":")):
            scores = [line["scores"][rule][group] for line in lines]
            color = f"C{list(LABELS).index(group)}"
            shares = [100 * s["correct"] / s["questions"] for s in scores]
            left.plot(tokens, shares, style, color=color, label=label if rule == "one_token" else None)
            if rule == "threshold":
                right.plot(tokens, [s["tokens_per_forward"] for s in scores], color=color, label=label)
    left.set(xlabel="million training tokens", ylabel="exact answers, %", ylim=(0, 102))
    left.set_title("held-out questions; dotted: threshold 0.9", fontsize=10)
    right.set(xlabel="million training tokens", ylabel="tokens per forward", ylim=(0, None))
    right.set_title("tokens per forward at threshold 0.9", fontsize=10)
    left.legend(fontsize=8, loc="lower right")
    figure.suptitle(plan.model_name)
    figure.tight_layout()
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"tiny-{plan.name}-curve.png", dpi=110)
