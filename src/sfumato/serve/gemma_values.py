"""Gemma 4's form of calls and values, read back: bare keys, strings between a control token of their own.

Source: the model's prompt format as published (ai.google.dev, "Gemma 4 prompt formatting").
"""

from __future__ import annotations

import json
import re
from typing import Any

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_OPENING = re.compile(rf"{re.escape(OPEN)}call:([^{{]+)(?={{)")
_BARE = re.compile(r"[^,}\]<]+")


class _Broken(Exception):
    """A text that is no value, or not yet a whole one."""


def read_call(text: str, begin: int) -> tuple[int, int, str, Any] | None:
    """Return the span, name and arguments of the first whole call from `begin` on."""
    opening = _OPENING.search(text, begin)
    if opening is None:
        return None
    try:
        arguments, end = _read(text, opening.end())
    except _Broken:
        return None
    if not text.startswith(CLOSE, end):
        return None
    return opening.start(), end + len(CLOSE), opening[1], arguments


def _read(text: str, at: int) -> tuple[Any, int]:
    """Return the value that begins at a position, and the position behind it. Raises _Broken."""
    if text.startswith(QUOTE, at):
        end = text.find(QUOTE, at + len(QUOTE))
        if end < 0:
            raise _Broken
        return text[at + len(QUOTE) : end], end + len(QUOTE)
    if text.startswith("{", at):
        return _read_object(text, at + 1)
    if text.startswith("[", at):
        return _read_list(text, at + 1)
    bare = _BARE.match(text, at)
    if bare is None:
        raise _Broken
    try:
        return json.loads(bare[0]), bare.end()
    except ValueError:
        # A model that no grammar holds may leave the quotes out.
        return bare[0], bare.end()


def _read_object(text: str, at: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    while not text.startswith("}", at):
        colon = text.find(":", at)
        if colon < 0:
            raise _Broken
        found[text[at:colon]], at = _read(text, colon + 1)
        at = _behind(text, at, "}")
    return found, at + 1


def _read_list(text: str, at: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    while not text.startswith("]", at):
        value, at = _read(text, at)
        found.append(value)
        at = _behind(text, at, "]")
    return found, at + 1


def _behind(text: str, at: int, closing: str) -> int:
    """Return where the next value begins, or the closing bracket stands. Raises _Broken."""
    if text.startswith(",", at):
        return at + 1
    if text.startswith(closing, at):
        return at
    raise _Broken
