"""Checks that every kind of text request needs: numbers in their range, tokens in the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterable

from sfumato.errors import RequestError


def check_range(name: str, value: float, minimum: float, maximum: float | None) -> None:
    """Raise RequestError for a number outside its range, infinity and NaN included."""
    if math.isfinite(value) and value >= minimum and (maximum is None or value <= maximum):
        return
    limit = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
    raise RequestError(f"{name} is {value}, it must be {limit}", field=name, value=value, limit=limit)


def check_tokens(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    """Raise RequestError for a token outside the vocabulary."""
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"{name} has token id {token}, outside the vocabulary of {vocab_size}",
                field=name,
                value=token,
                limit=vocab_size - 1,
            )
