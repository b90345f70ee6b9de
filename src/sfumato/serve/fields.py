"""Types of request fields: each parses one JSON value and says in words what is wrong with it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from sfumato.core.spec import ParameterValue

# The largest integers that cross to the engine.
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
_INT32_MAX = (1 << 31) - 1

Count = Annotated[int, Field(ge=1, le=_INT32_MAX)]
Seed = Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX)]
Priority = Annotated[int, Field(ge=-_INT32_MAX, le=_INT32_MAX)]
TopK = Annotated[int, Field(ge=-1, le=_INT32_MAX)]


def neutral(*values: object, reason: str = "it is not supported by this server") -> AfterValidator:
    """Mark a documented field that changes nothing at null and at these values; any other is refused."""

    def check(value: object) -> object:
        if value is None or value in values:
            return value
        accepted = ", ".join(repr(each) for each in (None, *values)).replace("None", "null")
        raise PydanticCustomError(
            "unsupported",
            "{value}: {reason}; leave it out (accepted: {accepted})",
            {"value": _shorten(value), "reason": reason, "accepted": accepted},
        )

    return AfterValidator(check)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _stops(value: object) -> object:
    """A string or a list of strings, none of them empty; null and an empty list say nothing."""
    given = [value] if isinstance(value, str) else value
    if given is None:
        return None
    if not isinstance(given, list) or not all(isinstance(stop, str) for stop in given):
        raise ValueError("expected a string or a list of strings")
    if "" in given:
        raise ValueError("an empty stop string would stop at once")
    return given


Stops = Annotated[list[str] | None, BeforeValidator(_stops)]


def _biases(value: object) -> object:
    """An object from token ids, written as strings, to numbers."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("expected an object of token ids and numbers")
    biases: dict[int, float] = {}
    for name, bias in value.items():
        if not (isinstance(name, str) and name.isascii() and name.isdigit() and len(name) < 12):
            raise ValueError(f"{_shorten(name)} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise ValueError(f"the bias of token {name} is {_shorten(bias)}, expected a number")
        biases[int(name)] = float(bias)
    return biases


Biases = Annotated[Any, BeforeValidator(_biases)]


def _parameters(value: object) -> object:
    """An object of numbers, booleans, strings and nulls; the algorithm checks names and ranges."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    for name, entry in value.items():
        if entry is not None and not isinstance(entry, bool | int | float | str):
            raise ValueError(f"{name} is {_shorten(entry)}, expected a number, a boolean, a string or null")
        if isinstance(entry, int) and not INT64_MIN <= entry <= INT64_MAX:
            raise ValueError(f"{name} is too large")
    return value


Parameters = Annotated[dict[str, ParameterValue] | None, BeforeValidator(_parameters)]


def _token_ids(value: object) -> object:
    if value is None:
        return None
    if not is_token_ids(value):
        raise ValueError("expected a list of token ids")
    return value


def is_token_ids(value: object) -> bool:
    """Whether a JSON value is a list of integers that can be token ids."""
    return isinstance(value, list) and all(type(each) is int and 0 <= each <= _INT32_MAX for each in value)


TokenIds = Annotated[Any, BeforeValidator(_token_ids)]


def whole(text: str) -> str:
    """Return a text unless it holds half a character, which JSON can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a surrogate stands alone; this is not text") from error
    return text


def _prompts(value: object) -> object:
    """One text, one list of token ids, or a list of either, as a list of prompts."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and value:
        if is_token_ids(value):
            return [value]
        if all(isinstance(each, str) for each in value):
            return [whole(each) for each in value]
        if all(is_token_ids(each) for each in value):
            return value
    raise ValueError(
        "expected a string, a list of token ids, a list of strings or a list of lists of token ids"
    )


Prompts = Annotated[Any, BeforeValidator(_prompts)]


def _one_prompt(value: object) -> object:
    """One text or one list of token ids."""
    if isinstance(value, str):
        return whole(value)
    if is_token_ids(value):
        return value
    raise ValueError("expected a string or a list of token ids")


OnePrompt = Annotated[Any, BeforeValidator(_one_prompt)]


def _content(value: object) -> object:
    """Text, or a list of text parts, which become lines."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("expected a string or a list of parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError(
                "unsupported",
                "a part of type {kind} is not supported; only text parts are",
                {"kind": repr(kind)},
            )
        unknown = [name for name in part if name not in ("type", "text") and part[name] is not None]
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r} in a text part")
        texts.append(part["text"])
    return "\n".join(texts)


Content = Annotated[str, BeforeValidator(_content)]
