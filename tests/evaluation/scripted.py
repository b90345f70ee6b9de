"""A model that answers from a table and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sfumato.core.messages import Usage
from sfumato.errors import RequestError
from sfumato.evaluation.backend import AlgorithmCard, Ask, ModelCard, OnReply, ParameterCard, Reply
from sfumato.evaluation.prompts import make_prompter
from sfumato.evaluation.questions import read_task
from sfumato.evaluation.run import Evaluation
from sfumato.evaluation.sweep import parse_sweep, plan_curves

CARD = ModelCard(
    id="scripted",
    dtype="float32",
    device="cpu",
    has_chat_template=True,
    block_length=4,
    default_max_tokens=8,
    default_algorithm="fast",
    default_algorithm_parameters={"threshold": 0.8},
    algorithms=(
        AlgorithmCard(
            name="fast",
            parameters=(
                ParameterCard(name="threshold", default=0.9),
                ParameterCard(name="mode", default="a"),
            ),
        ),
        AlgorithmCard(name="slow", parameters=(ParameterCard(name="steps", default=None),)),
    ),
)


def right_answer(ask: Ask) -> Reply:
    """Answer `n+n=` questions; 2 forwards at the first threshold, more at others."""
    text = ask.prompt if isinstance(ask.prompt, str) else ask.prompt[-1]["content"]
    number = int(text.split("+")[0])
    return Reply(
        id=ask.id,
        output=f"it is {2 * number}",
        usage=Usage(completion_tokens=6, nfe=2, denoise_steps=2),
        finish_reason="stop",
        seconds=0.1,
    )


class Scripted:
    """Answers in order; an answer may be an exception, which ends the run as Ctrl-C would."""

    def __init__(self, answer: Callable[[Ask], Reply] = right_answer, *, refuse: str | None = None) -> None:
        self.card = CARD
        self.where: dict[str, Any] = {"device": "table"}
        self.asked: list[Ask] = []
        self.concurrencies: list[int] = []
        self._answer = answer
        self._refuse = refuse

    def check(self, ask: Ask) -> None:
        """Refuse every setting if told to."""
        if self._refuse is not None:
            raise RequestError(self._refuse, field="algorithm")

    def run(self, asks: Sequence[Ask], on_reply: OnReply, *, concurrency: int) -> None:
        """Answer in order."""
        self.concurrencies.append(concurrency)
        for ask in asks:
            self.asked.append(ask)
            on_reply(self._answer(ask))


def write_questions(folder: Path, number: int = 6) -> Path:
    """Write `n+n=` questions whose answers are numbers."""
    path = folder / "sums.jsonl"
    lines = [f'{{"question": "{n}+{n}=", "answer": "so #### {2 * n}"}}' for n in range(1, number + 1)]
    path.write_text("\n".join(lines) + "\n")
    return path


def make_evaluation(folder: Path, *, sweep: str | None = None, **options: Any) -> Evaluation:
    """Return an evaluation of the sums on the scripted model."""
    task = read_task(str(write_questions(folder)))
    prompter = make_prompter(task, style="plain", num_shots=None, examples=None, is_raw=False)
    sweeps = [] if sweep is None else [parse_sweep(sweep)]
    curves = tuple(plan_curves(CARD, [], sweeps, {}))
    return Evaluation(task=task, prompter=prompter, curves=curves, out=folder / "out", **options)
