"""Own the held-out questions in the package: `python -m recipes.held_out` writes them for `sfumato eval`."""

import json
from pathlib import Path

from recipes.data import draw_held_out

TASKS = Path("src/sfumato/evaluation/tasks")
# Different questions per group; word problems are one task, half of it one-step and half two-step.
GROUPS = {
    "word-problems": {"word_problem_1": 100, "word_problem_2": 100},
    "extraction": {"extraction": 200},
    "rewriting": {"rewriting": 200},
}
# The questions behind the published scores, of which these are the first.
SEED = 2
# Held-out one-step problems are few; so many draws surely hold enough different ones.
NUM_DRAWN = 1000


def held_out_lines(task: str) -> list[str]:
    """Return the JSON lines of a task, the groups taking turns, so that any beginning holds all of them."""
    groups = []
    for group, number in GROUPS[task].items():
        answers = {example.question: example.answer for example in draw_held_out(group, NUM_DRAWN, SEED)}
        groups.append(list(answers.items())[:number])
    mixed = [pair for turn in zip(*groups, strict=True) for pair in turn]
    return [json.dumps({"question": question, "answer": answer}) for question, answer in mixed]


def main() -> None:
    """Write a file per task."""
    for task in GROUPS:
        path = TASKS / f"{task}.jsonl"
        path.write_text("\n".join(held_out_lines(task)) + "\n", encoding="utf-8")
        print(f"{path}: {len(held_out_lines(task))} questions")


if __name__ == "__main__":
    main()
