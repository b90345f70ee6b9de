"""Tasks: questions with exact answers from JSONL files, and the embedded models' own held-out sets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sfumato.errors import ConfigError
from sfumato.evaluation.answers import MARK, AnswerKind, marked, numbers_in

_EMBEDDED = Path(__file__).parent / "tasks"
# Either may hold the question, as data sets differ.
_QUESTION_FIELDS = ("question", "prompt")


@dataclass(frozen=True, slots=True)
class Question:
    """One question; `answer` is the text with its working, `expected` what an output is compared with."""

    id: str
    text: str
    answer: str
    expected: str


@dataclass(frozen=True, slots=True)
class Task:
    """Questions of one kind, in the order of their file; sha256 names their content."""

    name: str
    kind: AnswerKind
    questions: tuple[Question, ...]
    sha256: str


def embedded_tasks() -> list[str]:
    """Return the names of the held-out sets in the package."""
    return sorted(path.stem for path in _EMBEDDED.glob("*.jsonl"))


def read_task(task: str) -> Task:
    """Read an embedded task by name, or a file. Raises ConfigError naming file, line and field."""
    if task in embedded_tasks():
        return _read(_EMBEDDED / f"{task}.jsonl", task)
    path = Path(task)
    if not path.is_file():
        raise ConfigError(f"task {task!r} is neither a file nor one of {', '.join(embedded_tasks())}")
    return _read(path, path.stem)


def _read(path: Path, name: str) -> Task:
    """Read a JSONL file: one object a line, answers of one kind; empty lines are passed over."""
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    questions: list[Question] = []
    kind: AnswerKind | None = None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path} line {number}"
            question, own_kind = _read_line(line, str(number), where)
            if kind not in (None, own_kind):
                raise ConfigError(
                    f"{where}: field 'answer' {'has' if own_kind is AnswerKind.NUMBER else 'lacks'} "
                    f"{MARK!r}, unlike the lines before it; a task has answers of one kind"
                )
            kind = own_kind
            questions.append(question)
    if kind is None:
        raise ConfigError(f"{path}: no question in it")
    return Task(name, kind, tuple(questions), hashlib.sha256(content).hexdigest())


def _read_line(line: str, question_id: str, where: str) -> tuple[Question, AnswerKind]:
    try:
        fields = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: not a JSON object with 'question' and 'answer'")
    asked = [name for name in _QUESTION_FIELDS if name in fields]
    if len(asked) != 1:
        raise ConfigError(f"{where}: exactly one of the fields 'question' and 'prompt' is needed")
    text, answer = (_text(fields, name, where) for name in (asked[0], "answer"))
    result = marked(answer)
    if result is None:
        return Question(question_id, text, answer, answer.strip()), AnswerKind.TEXT
    numbers = numbers_in(result)
    if len(numbers) != 1:
        raise ConfigError(f"{where}: field 'answer' has {result!r} behind {MARK}; one number is needed")
    return Question(question_id, text, answer, numbers[0]), AnswerKind.NUMBER


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    if name not in fields:
        raise ConfigError(f"{where}: field {name!r} is missing")
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: field {name!r} is {value!r}; a text is needed")
    return value
