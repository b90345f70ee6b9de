"""One evaluation: every setting's questions that are not yet answered, then the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.engine.frontend import SamplingParams
from sfumato.errors import ConfigError, RequestError
from sfumato.evaluation.answers import found_answer, is_correct
from sfumato.evaluation.backend import Ask, Backend, Reply
from sfumato.evaluation.journal import Journal, Record
from sfumato.evaluation.prompts import RAW_STOP, Prompt, Prompter, prompt_sha256
from sfumato.evaluation.questions import Question, Task
from sfumato.evaluation.report import Report, make_report
from sfumato.evaluation.scores import Point, score
from sfumato.evaluation.sweep import Curve, Setting

# Setting, questions of it that are answered, how many of those are right.
OnProgress = Callable[[Setting, int, int], None]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is asked, how, and where the answers go; limit: the first questions only."""

    task: Task
    prompter: Prompter
    curves: tuple[Curve, ...]
    out: Path
    limit: int | None = None
    concurrency: int = 16
    max_tokens: int | None = None
    block_length: int | None = None
    seed: int = 0
    timeout: float = 600.0
    is_resuming: bool = True
    best_accuracy: float | None = None

    @property
    def questions(self) -> tuple[Question, ...]:
        """Return what is asked."""
        return self.task.questions[: self.limit]

    @property
    def settings(self) -> list[Setting]:
        """Return all settings in the order in which they are measured."""
        return [setting for curve in self.curves for setting in curve.settings]


def run(evaluation: Evaluation, backend: Backend, on_progress: OnProgress) -> Report:
    """Answer what is not answered yet and return the figures.

    Raises RequestError before any work where the model refuses a setting, and ConfigError where answers on
    disk are of other settings.
    """
    shared, prompter = _shared_settings(evaluation, backend), evaluation.prompter
    for setting in evaluation.settings:
        _check(_ask(evaluation, setting, prompter.anything()), setting, backend)
    try:
        evaluation.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {evaluation.out}: {error.strerror}") from error
    scored: list[tuple[Curve, list[Point]]] = []
    for curve in evaluation.curves:
        points = [_measure(evaluation, setting, backend, shared, on_progress) for setting in curve.settings]
        scored.append((curve, points))
    return make_report(
        evaluation.task.name,
        backend.card.id,
        shared | {"num_questions": len(evaluation.questions), "timeout": evaluation.timeout},
        backend.where,
        scored,
        evaluation.best_accuracy,
    )


def _shared_settings(evaluation: Evaluation, backend: Backend) -> dict[str, Any]:
    """Return what must be equal for answers, and for their speed, to be of one run."""
    card, prompter = backend.card, evaluation.prompter
    return {
        "task": evaluation.task.name,
        "task_sha256": evaluation.task.sha256,
        "answers": evaluation.task.kind,
        "model": card.id,
        "dtype": card.dtype,
        "over_http": "url" in backend.where,
        "prompt": prompter.style,
        "raw": prompter.is_raw,
        "shots": len(prompter.shots),
        "temperature": 0.0,
        "max_tokens": card.default_max_tokens if evaluation.max_tokens is None else evaluation.max_tokens,
        "block_length": card.block_length if evaluation.block_length is None else evaluation.block_length,
        "seed": evaluation.seed,
        "concurrency": evaluation.concurrency,
    }


def _asks(evaluation: Evaluation, setting: Setting) -> dict[str, Ask]:
    """Return what is sent, by question."""
    prompter = evaluation.prompter
    return {
        each.id: _ask(evaluation, setting, prompter.prompt(each), each.id) for each in evaluation.questions
    }


def _ask(evaluation: Evaluation, setting: Setting, prompt: Prompt, question_id: str = "") -> Ask:
    params = SamplingParams(
        max_tokens=evaluation.max_tokens,
        seed=evaluation.seed,
        stop=(RAW_STOP,) if evaluation.prompter.is_raw else (),
        algorithm=setting.algorithm,
        algorithm_parameters=setting.parameters,
        block_length=evaluation.block_length,
        timeout=evaluation.timeout,
    )
    return Ask(question_id, prompt, params)


def _check(ask: Ask, setting: Setting, backend: Backend) -> None:
    """Raise RequestError where the model refuses a setting, whatever is asked."""
    try:
        backend.check(ask)
    except RequestError as error:
        raise RequestError(
            f"{setting.label}: {error}", field=error.field, value=error.value, limit=error.limit
        ) from error


def _measure(
    evaluation: Evaluation,
    setting: Setting,
    backend: Backend,
    shared: dict[str, Any],
    on_progress: OnProgress,
) -> Point:
    """Answer one setting's open questions and return the figures of all of them."""
    own = shared | {"algorithm": setting.algorithm, "parameters": setting.effective}
    asks = _asks(evaluation, setting)
    expected = {each.id: each.expected for each in evaluation.questions}
    with Journal(evaluation.out / setting.file_name, own, resume=evaluation.is_resuming) as journal:
        _check_prompts(journal, asks)
        right = {name: record.correct for name, record in journal.records.items() if not record.error}
        right = {name: right[name] for name in asks if name in right}
        on_progress(setting, len(right), sum(right.values()))
        last = time.monotonic()

        def on_reply(reply: Reply) -> None:
            nonlocal last
            now = time.monotonic()
            record = _mark(evaluation.prompter, asks[reply.id], reply, expected[reply.id], now - last)
            last = now
            journal.add(record)
            right[record.id] = record.correct
            on_progress(setting, len(right), sum(right.values()))

        open_asks = [ask for name, ask in asks.items() if name not in right]
        backend.run(open_asks, on_reply, concurrency=evaluation.concurrency)
        return score(setting, [journal.records[name] for name in asks])


def _check_prompts(journal: Journal, asks: dict[str, Ask]) -> None:
    """Raise ConfigError where an answer on disk belongs to another prompt."""
    for name, ask in asks.items():
        record = journal.records.get(name)
        if record is not None and record.prompt_sha256 != prompt_sha256(ask.prompt):
            raise ConfigError(
                f"{journal.path}: question {name} was asked with another prompt; "
                "give another --out, or --no-resume to begin anew"
            )


def _mark(prompter: Prompter, ask: Ask, reply: Reply, expected: str, wall_seconds: float) -> Record:
    """Return what is kept of a reply; one with an error is not right."""
    found = None
    if reply.error is None:
        found = found_answer(reply.output, prompter.kind, expects_mark=prompter.expects_mark)
    return Record(
        id=reply.id,
        prompt_sha256=prompt_sha256(ask.prompt),
        output=reply.output,
        found=found,
        expected=expected,
        correct=is_correct(found, expected, prompter.kind),
        tokens=reply.usage.completion_tokens,
        nfe=reply.usage.nfe,
        denoise_steps=reply.usage.denoise_steps,
        cached_tokens=reply.usage.cached_tokens,
        finish_reason=reply.finish_reason,
        seconds=reply.seconds,
        wall_seconds=wall_seconds,
        error=reply.error,
    )
