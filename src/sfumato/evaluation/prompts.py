"""How a question is put: alone, with a request to think step by step, or behind worked examples."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from sfumato.errors import ConfigError
from sfumato.evaluation.answers import MARK, AnswerKind
from sfumato.evaluation.questions import Question, Task

Messages = list[dict[str, str]]
Prompt = str | Messages

# GSM8K's marks for a calculator, as in 48/2 = <<48/2=24>>24; a model should not learn to write them.
_CALCULATOR = re.compile(r"<<[^<>]*>>")
# Without a chat template a model goes on with a question of its own.
RAW_STOP = "\n\nQuestion:"


class PromptStyle(StrEnum):
    """The ways to put a question."""

    PLAIN = "plain"
    ZERO_SHOT_COT = "zero-shot-cot"
    FEW_SHOT = "few-shot"


@dataclass(frozen=True, slots=True)
class Prompter:
    """Puts questions in one style; raw: as one text, for models without a chat template."""

    style: PromptStyle
    kind: AnswerKind
    shots: tuple[Question, ...] = ()
    is_raw: bool = False

    @property
    def expects_mark(self) -> bool:
        """Whether the prompt asks for the answer behind a mark."""
        return self.style is PromptStyle.ZERO_SHOT_COT

    def anything(self) -> Prompt:
        """Return a prompt that is short enough for every model, to try settings with."""
        return "?" if self.is_raw else [{"role": "user", "content": "?"}]

    def prompt(self, question: Question) -> Prompt:
        """Return a conversation, or the text that a model goes on with."""
        turns = [(shot.text, _CALCULATOR.sub("", shot.answer)) for shot in self.shots]
        asked = question.text
        if self.expects_mark:
            what = "number" if self.kind is AnswerKind.NUMBER else "answer"
            asked += (
                f"\nThink step by step. Then write the final {what} alone on the last line, behind {MARK}"
            )
        if self.is_raw:
            worked = "".join(f"Question: {text}\nAnswer: {answer}\n\n" for text, answer in turns)
            return asked if self.style is PromptStyle.PLAIN else f"{worked}Question: {asked}\nAnswer:"
        messages: Messages = []
        for text, answer in turns:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": asked}]


def prompt_sha256(prompt: Prompt) -> str:
    """Return a name for what exactly was asked."""
    return hashlib.sha256(msgspec.json.encode(prompt)).hexdigest()


def make_prompter(
    task: Task, *, style: str | None, num_shots: int | None, examples: Task | None, is_raw: bool
) -> Prompter:
    """Join the options of a command line; examples: what the shots are taken from, from its beginning.

    Without a style: few-shot with shots, else step by step for numbers and plain for texts.
    Raises ConfigError naming the options that do not go together.
    """
    if style is not None and style not in list(PromptStyle):
        raise ConfigError(f"--prompt {style!r} is not one of {', '.join(PromptStyle)}")
    if (num_shots is None) != (examples is None):
        raise ConfigError("--shots and --shots-file need each other")
    if style is None:
        by_kind = PromptStyle.ZERO_SHOT_COT if task.kind is AnswerKind.NUMBER else PromptStyle.PLAIN
        chosen = by_kind if examples is None else PromptStyle.FEW_SHOT
    else:
        chosen = PromptStyle(style)
    if (chosen is PromptStyle.FEW_SHOT) != (examples is not None):
        raise ConfigError(f"--prompt {chosen} {'needs' if examples is None else 'excludes'} --shots")
    shots = () if examples is None else _take_shots(task, examples, num_shots or 0)
    return Prompter(chosen, task.kind, shots, is_raw)


def _take_shots(task: Task, examples: Task, number: int) -> tuple[Question, ...]:
    if examples.kind is not task.kind:
        raise ConfigError(f"--shots-file has answers of kind {examples.kind}, the task of kind {task.kind}")
    if len(examples.questions) < number:
        raise ConfigError(f"--shots {number} is more than the {len(examples.questions)} of --shots-file")
    shots = examples.questions[:number]
    asked = {question.text for question in task.questions}
    for shot in shots:
        if shot.text in asked:
            raise ConfigError(f"--shots-file line {shot.id} is a question of the task itself")
    return shots
