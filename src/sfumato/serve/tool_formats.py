"""How models write calls of functions: which form a checkpoint's template speaks, its grammar, reading it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sfumato.core.spec import Grammar
from sfumato.serve.gemma_schema import calls_of
from sfumato.serve.gemma_values import CLOSE as GEMMA_CLOSE
from sfumato.serve.gemma_values import OPEN as GEMMA_OPEN
from sfumato.serve.gemma_values import QUOTE, read_call
from sfumato.text.tokenizer import Tokenizer

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_OPENING, _CLOSING = re.compile(rf"{OPEN}\s*"), re.compile(rf"\s*{CLOSE}")
# Bounded, as in every other schema.
_GUIDANCE = {"whitespace_pattern": "( |\\n {0,32})?"}

# Where a call stands in a text, its name and its arguments.
Found = tuple[int, int, str, Any]


@dataclass(frozen=True, slots=True)
class Signature:
    """A function's name and the JSON schema of its arguments, None where it takes whatever comes."""

    name: str
    parameters: dict[str, Any] | None


class ToolFormat(Protocol):
    """One way to write calls.

    opening: the text that begins one. special_tokens: tokens that its text has, special as they are.
    """

    @property
    def opening(self) -> str: ...

    @property
    def special_tokens(self) -> frozenset[str]: ...

    def grammar(self, functions: Sequence[Signature], *, must_call: bool, is_parallel: bool) -> Grammar:
        """Return the grammar of an answer: calls alone, or text that may end in calls.

        Raises NotSupported for a schema keyword that it has no form for.
        """
        ...

    def next_call(self, text: str, begin: int) -> Found | None:
        """Return the first whole call from `begin` on; its own strings may hold tags."""
        ...


@dataclass(frozen=True, slots=True)
class TaggedJson:
    """JSON with `name` and `arguments` between `<tool_call>` tags (Hermes, Qwen, Ling).

    special_tokens: those of the tags that are single, special tokens of the checkpoint.
    """

    special_tokens: frozenset[str] = frozenset()

    @property
    def opening(self) -> str:
        """Return the tag."""
        return OPEN

    def grammar(self, functions: Sequence[Signature], *, must_call: bool, is_parallel: bool) -> Grammar:
        """Let llguidance read the schemas; a lazy lexeme ends text with the first tag, so none is in it."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function.name},
                    "arguments": function.parameters or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for function in functions
        ]
        schema = {"x-guidance": _GUIDANCE, "anyOf": calls}
        more = '("\\n" call)*' if is_parallel else ""
        opening = OPEN if OPEN in self.special_tokens else f'"{OPEN}"'
        closing = f'"\\n" {CLOSE}' if CLOSE in self.special_tokens else f'"\\n{CLOSE}"'
        rules = f'call: {opening} rest\nrest: "\\n" body {closing}\nbody: %json {json.dumps(schema)}\n'
        if must_call:
            return Grammar(kind="tools", source=f"start: call {more}\n{rules}")
        if OPEN in self.special_tokens:
            source = f"start: TEXT? (call {more})?\nTEXT: /(.|\\n)+/\n{rules}"
        else:
            source = f"start: TEXT | opening rest {more}\nTEXT: /(.|\\n)*/\n"
            source += f"opening[lazy]: TEXT {opening}\n{rules}"
        return Grammar(kind="tools", source=source)

    def next_call(self, text: str, begin: int) -> Found | None:
        """Read JSON, then the tag that closes it."""
        opening = _OPENING.search(text, begin)
        if opening is None:
            return None
        try:
            called, end = json.JSONDecoder().raw_decode(text, opening.end())
        except ValueError:
            return None
        closing = _CLOSING.match(text, end)
        if closing is None:
            return None
        return opening.start(), closing.end(), called["name"], called["arguments"]


@dataclass(frozen=True, slots=True)
class GemmaCalls:
    """Gemma 4's calls, DiffusionGemma's among them: `<|tool_call>call:name{key:value}<tool_call|>`."""

    special_tokens: frozenset[str] = frozenset((GEMMA_OPEN, GEMMA_CLOSE, QUOTE))

    @property
    def opening(self) -> str:
        """Return the control token."""
        return GEMMA_OPEN

    def grammar(self, functions: Sequence[Signature], *, must_call: bool, is_parallel: bool) -> Grammar:
        """Write the schemas out as rules; no text can hold a control token."""
        rules = calls_of([(function.name, function.parameters) for function in functions])
        calls = "call+" if is_parallel else "call"
        start = calls if must_call else f"TEXT? ({calls})?"
        text = "" if must_call else "TEXT: /(.|\\n)+/\n"
        return Grammar(kind="tools", source=f"start: {start}\n{text}{rules}")

    def next_call(self, text: str, begin: int) -> Found | None:
        """Read a name and values."""
        return read_call(text, begin)


def format_of(tokenizer: Tokenizer) -> ToolFormat:
    """Return the form in which a checkpoint's template writes calls; tagged JSON where it has none."""
    special = tokenizer.special_tokens
    if GEMMA_OPEN in special and GEMMA_OPEN in tokenizer.chat_template:
        return GemmaCalls()
    return TaggedJson(frozenset((OPEN, CLOSE)) & special.keys())
