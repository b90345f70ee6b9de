"""Files of questions, those in the package among them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from recipes.data import draw_training_example
from recipes.held_out import GROUPS, TASKS, held_out_lines
from sfumato.errors import ConfigError
from sfumato.evaluation.answers import AnswerKind
from sfumato.evaluation.questions import embedded_tasks, read_task

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no question"),
        ("\n\n", "no question"),
        ("{", "line 1: not JSON"),
        ("[]", "line 1: not a JSON object"),
        ('{"question": "a", "answer": "b"}\n\n{"answer": "b"}', "line 3: exactly one of .*'question'"),
        ('{"question": "a", "prompt": "a", "answer": "b"}', "exactly one of"),
        ('{"question": "a"}', "line 1: field 'answer' is missing"),
        ('{"question": "a", "answer": 5}', "field 'answer' is 5"),
        ('{"question": " ", "answer": "b"}', "field 'question' is ' '"),
        ('{"question": "a", "answer": "#### many"}', "line 1: field 'answer' has 'many'"),
        ('{"question": "a", "answer": "#### 1 or 2"}', "one number is needed"),
        ('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "#### 2"}', "line 2: .* has '####'"),
        (
            '{"question": "a", "answer": "#### 2"}\n{"question": "c", "answer": "2"}',
            "line 2: .* lacks '####'",
        ),
    ],
)
def test_a_bad_file_names_itself_line_and_field(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_task(str(path))
    assert str(path) in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'nowhere.jsonl' .*extraction, rewriting, word-problems"):
        read_task("nowhere.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(ConfigError, match="UTF-8"):
        read_task(str(tmp_path / "latin.jsonl"))


def test_both_forms_are_read(tmp_path: Path) -> None:
    path = tmp_path / "gsm.jsonl"
    path.write_text('{"question": "2 and 2?", "answer": "2+2 = <<2+2=4>>4\\n#### 1,004", "level": 1}\n')
    task = read_task(str(path))
    assert (task.name, task.kind) == ("gsm", AnswerKind.NUMBER)
    assert task.questions[0].expected == "1004"
    path.write_text('{"prompt": "2 and 2?", "answer": " four "}\n')
    task = read_task(str(path))
    assert task.kind is AnswerKind.TEXT
    assert (task.questions[0].text, task.questions[0].expected) == ("2 and 2?", "four")


def test_the_embedded_tasks_are_what_the_recipe_draws() -> None:
    assert embedded_tasks() == sorted(GROUPS)
    for name in GROUPS:
        path = ROOT / TASKS / f"{name}.jsonl"
        assert path.read_text(encoding="utf-8").splitlines() == held_out_lines(name)
        assert path.stat().st_size < 100_000
        texts = [question.text for question in read_task(name).questions]
        assert len(set(texts)) == len(texts) == 200


def test_training_never_draws_an_embedded_question() -> None:
    asked = {question.text for name in GROUPS for question in read_task(name).questions}
    random_source = random.Random(7)
    assert not {draw_training_example(random_source).question for _ in range(20_000)} & asked


def test_the_lm_eval_example_has_questions_of_the_package() -> None:
    lines = (ROOT / "examples" / "lm-eval" / "word_problems.jsonl").read_text(encoding="utf-8").splitlines()
    questions = read_task("word-problems").questions[: len(lines)]
    assert [json.loads(line)["question"] for line in lines] == [question.text for question in questions]
