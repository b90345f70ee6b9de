"""Own the comparison of exported models through the engine: accuracy against tokens per forward (TPF)."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes.data import Example, draw_held_out
from sfumato import Engine, Limits, SamplingParams

ROWS_PER_FORWARD = 32
# The groups in which accuracy depends on the rule get most; 1,500 questions would not resolve it.
QUESTIONS = {"word_problem_1": 500, "word_problem_2": 1500, "extraction": 500, "rewriting": 2500}
# Differs from the seeds of the learning curve and of the published scores.
SEED = 11
# Two-sided 95 % of the normal distribution.
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Point:
    """One decoding rule: an algorithm with its parameters."""

    algorithm: str
    parameters: dict[str, Any]

    @property
    def label(self) -> str:
        """Name the rule by its threshold."""
        threshold = self.parameters.get("threshold")
        return self.algorithm if threshold is None else f"{self.algorithm} {threshold:g}"


POINTS = (
    *(Point("fast_dllm", {"threshold": t}) for t in (0.98, 0.9, 0.7, 0.5, 0.3)),
    *(Point("entropy_threshold", {"threshold": t}) for t in (0.1, 0.4, 0.8, 2.0)),
    *(Point("d3llm", {"threshold": t, "variant": "llada"}) for t in (0.1, 0.45, 0.8, 2.0)),
)


@dataclass(frozen=True)
class Measured:
    """One model's answers to one group of questions; tokens with the end token, forwards with all."""

    questions: int
    correct: int
    tokens: int
    forwards: int

    @property
    def tpf(self) -> float:
        """Return output tokens per forward."""
        return self.tokens / self.forwards


def pooled(parts: Sequence[Measured]) -> Measured:
    """Add groups up."""
    names = ("questions", "correct", "tokens", "forwards")
    return Measured(**{name: sum(getattr(part, name) for part in parts) for name in names})


def wilson_interval(correct: int, questions: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson's, which stays sensible near 100 %)."""
    share, square = correct / questions, NORMAL_95**2
    middle = share + square / (2 * questions)
    spread = NORMAL_95 * math.sqrt(share * (1 - share) / questions + square / (4 * questions**2))
    return (middle - spread) / (1 + square / questions), (middle + spread) / (1 + square / questions)


def measure(engine: Engine, examples: list[Example], point: Point) -> Measured:
    """Answer all questions together; a whole answer must equal the expected one."""
    chats = [[{"role": "user", "content": example.question}] for example in examples]
    params = SamplingParams(algorithm=point.algorithm, algorithm_parameters=point.parameters)
    choices = engine.generate(chats, params)
    correct = sum(choice.text == e.answer for choice, e in zip(choices, examples, strict=True))
    tokens = sum(len(choice.token_ids) for choice in choices)
    return Measured(len(examples), correct, tokens, sum(choice.usage.nfe for choice in choices))


def compare(models: Sequence[str], points: Sequence[Point], path: Path) -> None:
    """Measure every model under every rule on the same held-out questions; write JSON, one entry per pair."""
    groups = {group: draw_held_out(group, number, SEED) for group, number in QUESTIONS.items()}
    entries = []
    for model in models:
        engine = Engine.load(model, device="cpu", limits=Limits(max_running_requests=ROWS_PER_FORWARD))
        for point in points:
            by_group = {group: measure(engine, examples, point) for group, examples in groups.items()}
            entries.append(entry(model, point, by_group))
            path.write_text(json.dumps(entries, indent=2) + "\n")
            _print_line(model, point, by_group)


def entry(model: str, point: Point, by_group: dict[str, Measured]) -> dict[str, Any]:
    """Return what is written about one model under one rule."""
    total = pooled(list(by_group.values()))
    return {
        "model": model,
        "algorithm": point.algorithm,
        "parameters": point.parameters,
        "groups": {group: asdict(part) for group, part in by_group.items()},
        "accuracy": total.correct / total.questions,
        "accuracy_interval": wilson_interval(total.correct, total.questions),
        "tpf": total.tpf,
    }


def _print_line(model: str, point: Point, by_group: dict[str, Measured]) -> None:
    total = pooled(list(by_group.values()))
    parts = [f"{100 * p.correct / p.questions:.2f} % {p.tpf:.2f}" for p in by_group.values()]
    share = 100 * total.correct / total.questions
    print(f"{model} {point.label}: {share:.2f} % TPF {total.tpf:.2f} | {' | '.join(parts)}", flush=True)
