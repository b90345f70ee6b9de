"""How questions are put."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfumato.errors import ConfigError
from sfumato.evaluation.prompts import PromptStyle, make_prompter, prompt_sha256
from sfumato.evaluation.questions import Task, read_task
from tests.evaluation.scripted import write_questions


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return read_task(str(write_questions(tmp_path)))


@pytest.fixture
def examples(tmp_path: Path) -> Task:
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "9+9=", "answer": "9+9 = <<9+9=18>>18\\n#### 18"}\n')
    return read_task(str(path))


def prompter(task: Task, **options: Any) -> Any:
    return make_prompter(
        task, **{"style": None, "num_shots": None, "examples": None, "is_raw": False} | options
    )


def test_the_default_fits_the_task(task: Task, examples: Task) -> None:
    assert prompter(task).style is PromptStyle.ZERO_SHOT_COT
    assert prompter(read_task("rewriting")).style is PromptStyle.PLAIN
    assert prompter(task, num_shots=1, examples=examples).style is PromptStyle.FEW_SHOT


def test_conversations(task: Task, examples: Task) -> None:
    question = task.questions[0]
    assert prompter(task, style="plain").prompt(question) == [{"role": "user", "content": "1+1="}]
    (asked,) = prompter(task).prompt(question)
    assert asked["content"].startswith("1+1=\n")
    assert "final number" in asked["content"]
    assert asked["content"].endswith("####")
    assert prompter(task, num_shots=1, examples=examples).prompt(question) == [
        {"role": "user", "content": "9+9="},
        {"role": "assistant", "content": "9+9 = 18\n#### 18"},
        {"role": "user", "content": "1+1="},
    ]


def test_raw_texts(task: Task, examples: Task) -> None:
    question = task.questions[0]
    assert prompter(task, style="plain", is_raw=True).prompt(question) == "1+1="
    shots = prompter(task, num_shots=1, examples=examples, is_raw=True).prompt(question)
    assert shots == "Question: 9+9=\nAnswer: 9+9 = 18\n#### 18\n\nQuestion: 1+1=\nAnswer:"
    assert prompt_sha256(shots) != prompt_sha256(shots + " ")


def test_options_that_do_not_go_together(task: Task, examples: Task) -> None:
    for options, reason in (
        ({"style": "loud"}, "--prompt 'loud' .*plain, zero-shot-cot, few-shot"),
        ({"num_shots": 1}, "--shots and --shots-file"),
        ({"examples": examples}, "--shots and --shots-file"),
        ({"style": "few-shot"}, "few-shot needs --shots"),
        ({"style": "plain", "num_shots": 1, "examples": examples}, "plain excludes --shots"),
        ({"num_shots": 2, "examples": examples}, "--shots 2 is more than the 1"),
        ({"num_shots": 1, "examples": read_task("rewriting")}, "kind text, the task of kind number"),
        ({"num_shots": 1, "examples": task}, "line 1 is a question of the task"),
    ):
        with pytest.raises(ConfigError, match=reason):
            prompter(task, **options)
