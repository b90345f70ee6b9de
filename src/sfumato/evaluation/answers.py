"""The rules by which an output is right: numbers are equal as numbers, other answers are equal as text."""

from __future__ import annotations

import re
from decimal import Decimal
from enum import StrEnum

# Stands in front of the result, in GSM8K's answers and in what a model is asked to write.
MARK = "####"

# A sign is one only where no digit stands in front of it: 20-15 ends with 15. Thousands go by threes.
_NUMBER = re.compile(r"(?<![\d.])-?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])-?\$?\.\d+|\d+")


class AnswerKind(StrEnum):
    """How answers of a task are compared."""

    NUMBER = "number"
    TEXT = "text"


def numbers_in(text: str) -> list[str]:
    """Return every number of a text as plain digits: without commas, dollar signs and trailing periods."""
    return [found[0].replace("$", "").replace(",", "") for found in _NUMBER.finditer(text)]


def marked(text: str) -> str | None:
    """Return what stands behind the last mark, to the end of its line; None without a mark."""
    _, mark, rest = text.rpartition(MARK)
    return rest.strip().partition("\n")[0].strip() if mark else None


def found_answer(output: str, kind: AnswerKind, *, expects_mark: bool) -> str | None:
    """Return what counts as the output's answer, None where it has none.

    A number is the first behind the last mark, else the last number of the output. A text is what stands
    behind the last mark where the prompt asks for one, else the whole output without surrounding space.
    """
    behind = marked(output)
    if kind is AnswerKind.TEXT:
        return behind if expects_mark and behind is not None else output.strip()
    numbers = numbers_in(behind or "")[:1] or numbers_in(output)[-1:]
    return numbers[0] if numbers else None


def is_correct(found: str | None, expected: str, kind: AnswerKind) -> bool:
    """Whether an answer is right; both as `found_answer` returns them."""
    if found is None:
        return False
    return Decimal(found) == Decimal(expected) if kind is AnswerKind.NUMBER else found == expected
