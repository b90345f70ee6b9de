"""Grammars that an answer must obey: what a request says becomes an automaton over tokens, by llguidance.

No tensor; the server checks grammars in its own process before an engine sees them.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from sfumato.core.spec import Grammar
from sfumato.errors import NotSupported, RequestError

# The field of a request in which each kind is said.
FIELDS = {
    "json_object": "response_format",
    "json_schema": "response_format",
    "regex": "regex",
    "choice": "choice",
    "lark": "grammar",
    "tools": "tools",
}
_MAX_BYTES = 1 << 20
_KEPT = 64
# Between the tokens of JSON a space, or a new line with its indent: endless blanks would be valid, and some
# models like them. A schema's own `x-guidance` goes before.
_JSON: Any = {"whitespace_pattern": "( |\n {0,32})?"}


def field_of(grammar: Grammar) -> str:
    """Return the field in which a grammar is said. Raises RequestError for a kind that does not exist."""
    if grammar.kind not in FIELDS:
        raise RequestError(
            f"a grammar of kind {grammar.kind!r} does not exist; there are {', '.join(FIELDS)}",
            field="grammar",
            value=grammar.kind,
        )
    return FIELDS[grammar.kind]


@lru_cache(maxsize=256)
def compiled(grammar: Grammar) -> str:
    """Return a grammar in llguidance's form. Raises RequestError naming the field and what is wrong."""
    if len(grammar.source.encode()) > _MAX_BYTES:
        raise _refused(grammar, f"it has more than {_MAX_BYTES} bytes")
    try:
        made = _made(grammar)
    except ValueError as error:
        raise _refused(grammar, _reason(str(error))) from error
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(made, None)
    if is_wrong:
        reason = _reason(messages[0] if messages else "it cannot be compiled")
        unknown = re.search(r"Unimplemented keys: (\[.*?\])", reason)
        if unknown:
            names = ", ".join(map(repr, json.loads(unknown[1])))
            raise NotSupported(
                f"{field_of(grammar)}: the schema keyword {names} is not supported",
                field=field_of(grammar),
                value=names,
            )
        raise _refused(grammar, reason)
    return made


def _made(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_object":
            made = LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=_JSON)
        case "json_schema":
            made = LLMatcher.grammar_from_json_schema(grammar.source, defaults=_JSON)
        case "regex":
            made = LLMatcher.grammar_from_regex(grammar.source)
        case "choice":
            made = LLMatcher.grammar_from_lark(
                "start: " + " | ".join(map(_literal, json.loads(grammar.source)))
            )
        case "lark" | "tools":
            made = LLMatcher.grammar_from_lark(grammar.source)
        case _:
            raise AssertionError(f"{field_of(grammar)} is a kind without a compiler")
    return str(made)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refused(grammar: Grammar, reason: str) -> RequestError:
    return RequestError(f"{field_of(grammar)}: {reason}", field=field_of(grammar), value=grammar.source[:200])


def _reason(text: str) -> str:
    """Return the first line of a compiler's message, and what it calls the error where that stands below."""
    lines = text.strip().splitlines() or ["it cannot be compiled"]
    errors = [line.removeprefix("error:").strip() for line in lines[1:] if line.startswith("error:")]
    return " ".join([re.sub(r"^at \d+\(\d+\): ", "", lines[0]), *errors[:1]])


class Grammars:
    """A model's tokenizer as automata see it, read in the background, and the automata that were made."""

    def __init__(self, path: Path, *, vocab_size: int, end_ids: tuple[int, ...]) -> None:
        self.vocab_size = vocab_size
        self.end_ids = end_ids
        self._worker = ThreadPoolExecutor(1, "grammars")
        self._tokenizer: Future[LLTokenizer] = self._worker.submit(self._read, path)
        self._made: dict[Grammar, Future[Any]] = {}

    def _read(self, path: Path) -> LLTokenizer:
        text = (path / "tokenizer.json").read_text(encoding="utf-8")
        return LLTokenizer(text, n_vocab=self.vocab_size, eos_token=list(self.end_ids))

    def prepare(self, grammar: Grammar) -> Future[Any]:
        """Compile a grammar in the background; the last used ones are kept."""
        made = self._made.pop(grammar, None) or self._worker.submit(self._make, grammar)
        self._made[grammar] = made
        if len(self._made) > _KEPT:
            del self._made[next(iter(self._made))]
        return made

    def matcher(self, grammar: Grammar) -> Any:
        """Return a fresh automaton, once it is compiled. Raises RequestError."""
        if not self.end_ids:
            raise NotSupported(f"{field_of(grammar)}: this model has no end token", field=field_of(grammar))
        return self.prepare(grammar).result().deep_copy()

    def _make(self, grammar: Grammar) -> Any:
        try:
            tokenizer = self._tokenizer.result()
        except (OSError, ValueError) as error:
            field = field_of(grammar)
            raise NotSupported(
                f"{field}: this model's tokenizer is not supported: {_reason(str(error))}", field=field
            ) from error
        matcher = LLMatcher(tokenizer, compiled(grammar), log_level=0)
        if matcher.is_error():
            raise _refused(grammar, _reason(matcher.get_error()))
        return matcher
