"""Answers of the embedded models through the engine: `python -m benchmarks.accuracy`.

500 held-out questions per task, exact answers, greedy: with one token per step, and with what the server does
by default. TPF: output tokens, the end token among them, per forward.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table

from recipes.data import draw_held_out
from sfumato import Engine, Limits, SamplingParams
from sfumato.models.folder import embedded_models

# Word problems are one task, half of it one-step and half two-step.
QUESTIONS = {"word_problem_1": 250, "word_problem_2": 250, "extraction": 500, "rewriting": 500}
# The questions behind the published table.
SEED = 2
RULES = {
    "one token per step": SamplingParams(algorithm="fast_dllm", algorithm_parameters={"threshold": 2.0}),
    "server default": SamplingParams(),
}


def main() -> None:
    """Print a table of scores."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--models", default=",".join(embedded_models()))
    parser.add_argument("--share", type=float, default=1.0, help="of the questions")
    parser.add_argument("--rules", default=",".join(RULES), help=f"of {', '.join(RULES)}")
    options = parser.parse_args()
    rules = {rule: params for rule, params in RULES.items() if rule in options.rules.split(",")}
    torch.set_num_threads(1)
    table = Table(title="exact answers to held-out questions")
    for heading in ("model", "decoding", "task", "questions", "correct", "TPF", "tokens/s"):
        table.add_column(heading, justify="right")
    for model in options.models.split(","):
        engine = Engine.load(model, device="cpu", limits=Limits(max_running_requests=32))
        for rule, params in rules.items():
            for task, number in QUESTIONS.items():
                examples = draw_held_out(task, int(number * options.share), SEED)
                started = time.perf_counter()
                chats = [[{"role": "user", "content": example.question}] for example in examples]
                choices = engine.generate(chats, params)
                seconds = time.perf_counter() - started
                correct = sum(c.text == e.answer for c, e in zip(choices, examples, strict=True))
                tokens = sum(len(choice.token_ids) for choice in choices)
                forwards = sum(choice.usage.nfe for choice in choices)
                share = f"{100 * correct / len(examples):.1f} %"
                rate = f"{tokens / seconds:.0f}"
                table.add_row(model, rule, task, str(len(examples)), share, f"{tokens / forwards:.2f}", rate)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
