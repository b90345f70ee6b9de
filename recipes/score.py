"""Own the final scores of an exported model: 500 held-out questions per task, as JSON beside the curves."""

import json
from dataclasses import asdict

from recipes.data import draw_held_out
from recipes.evaluate import DECODING_RULES, score
from recipes.export import load_exported
from recipes.plan import LOGS, Plan
from recipes.tokenizer import load_tokenizer

# Word problems are one task, half of it one-step and half two-step.
NUM_QUESTIONS = {"word_problem_1": 250, "word_problem_2": 250, "extraction": 500, "rewriting": 500}
# Differs from the seed of the questions behind the curve.
SEED = 2


def write_scores(plan: Plan) -> None:
    """Score the exported folder under both decoding rules and write recipes/logs/<name>-scores.json."""
    model, tokenizer = load_exported(plan.zoo_folder, plan), load_tokenizer(plan.tokenizer_path)
    scores = {}
    for rule, threshold in DECODING_RULES.items():
        scores[rule] = {}
        for group, num_questions in NUM_QUESTIONS.items():
            result = score(model, tokenizer, draw_held_out(group, num_questions, SEED), threshold)
            scores[rule][group] = asdict(result)
            share = result.correct / result.questions
            print(f"{plan.name} {rule} {group}: {share:.1%}, TPF {result.tokens_per_forward}", flush=True)
    (LOGS / f"{plan.name}-scores.json").write_text(json.dumps(scores, indent=2) + "\n")
