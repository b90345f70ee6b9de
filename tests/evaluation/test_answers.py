"""Which outputs are right."""

from __future__ import annotations

import pytest

from sfumato.evaluation.answers import AnswerKind, found_answer, is_correct

NUMBERS = [
    ("#### 42", "42"),
    ("so it is 7.\n#### 42.", "42"),
    ("#### $1,234.50", "1234.50"),
    ("#### 42 apples, not 43", "42"),
    ("#### 1\nno:\n#### 2", "2"),
    ("#### none, but 5 before", "5"),
    ("first 7, then 9", "9"),
    ("9 is left ####", "9"),
    ("it costs $18.", "18"),
    ("20-15", "15"),
    ("20 - 15 = 5, so -5", "-5"),
    ("-$3.20", "-3.20"),
    ("about .5", ".5"),
    ("1,234,567 of them", "1234567"),
    ("1,2,3", "3"),
    ("12,34", "34"),
    ("25%", "25"),
    ("version 1.2.", "1.2"),
    ("no number here", None),
    ("", None),
]


@pytest.mark.parametrize(("output", "found"), NUMBERS)
def test_numbers_are_found(output: str, found: str | None) -> None:
    for expects_mark in (False, True):
        assert found_answer(output, AnswerKind.NUMBER, expects_mark=expects_mark) == found


@pytest.mark.parametrize(
    ("output", "found", "marked"),
    [
        (" apple fig \n", "apple fig", "apple fig"),
        ("first fig\n#### apple fig \nbye", "first fig\n#### apple fig \nbye", "apple fig"),
    ],
)
def test_texts_are_whole_outputs(output: str, found: str, marked: str) -> None:
    assert found_answer(output, AnswerKind.TEXT, expects_mark=False) == found
    assert found_answer(output, AnswerKind.TEXT, expects_mark=True) == marked


def test_numbers_are_equal_as_numbers_and_texts_as_texts() -> None:
    assert is_correct("18.0", "18", AnswerKind.NUMBER)
    assert is_correct(".5", "0.50", AnswerKind.NUMBER)
    assert not is_correct("-18", "18", AnswerKind.NUMBER)
    assert not is_correct(None, "18", AnswerKind.NUMBER)
    assert is_correct("apple fig", "apple fig", AnswerKind.TEXT)
    assert not is_correct("18.0", "18", AnswerKind.TEXT)
