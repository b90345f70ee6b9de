"""Log probabilities in OpenAI's two forms, aligned with the text that is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.core.messages import TokenLogprob
from sfumato.engine.frontend import Delta
from sfumato.serve.registry import ServedModel
from sfumato.text.tokenizer import TextStream, Tokenizer

# JSON has no minus infinity; OpenAI reports this number for tokens that cannot be.
_LOWEST = -9999.0
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One token with its log probability; offset: characters of shown text in front of it."""

    token_id: int
    logprob: TokenLogprob
    offset: int


class TokenLog:
    """Gives out the log probabilities of one choice's tokens together with their text.

    A token is held back as long as its text is (a stop string may still cut it), and never given out if its
    text is never shown: what stands behind a stop string, or the end token itself. gives_all: every token is
    given at once, shown or not.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, gives_all: bool = False) -> None:
        self._gives_all = gives_all
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._held: list[TokenEntry] = []
        self._end = 0
        self._shown = 0

    def push(self, delta: Delta) -> list[TokenEntry]:
        """Return the entries of tokens whose text is out now."""
        for token_id, logprob in zip(delta.token_ids, delta.logprobs or (), strict=False):
            self._held.append(TokenEntry(token_id, logprob, self._end))
            self._end += 1 if self._stream is None else len(self._stream.push([token_id]))
        self._shown += len(delta.text) if self._stream is not None else len(delta.token_ids)
        count = next(
            (at for at, entry in enumerate(self._held) if entry.offset >= self._shown), len(self._held)
        )
        if self._gives_all:
            count = len(self._held)
        given, self._held = self._held[:count], self._held[count:]
        return given


def text_offsets(tokenizer: Tokenizer | None, token_ids: Sequence[int]) -> list[int]:
    """Return for each token how many characters of text stand in front of it."""
    if tokenizer is None:
        return list(range(len(token_ids)))
    stream, end, offsets = TextStream(tokenizer), 0, []
    for token_id in token_ids:
        offsets.append(end)
        end += len(stream.push([token_id]))
    return offsets


def chat_logprobs(model: ServedModel, entries: Sequence[TokenEntry]) -> dict[str, Any]:
    """Return the chat form."""
    content = []
    for entry in entries:
        top = zip(entry.logprob.top_ids, entry.logprob.top_logprobs, strict=True)
        described = _describe(model, entry.token_id, entry.logprob.logprob)
        described["top_logprobs"] = [_describe(model, token_id, logprob) for token_id, logprob in top]
        content.append(described)
    return {"content": content, "refusal": None}


def _describe(model: ServedModel, token_id: int, logprob: float) -> dict[str, Any]:
    piece = model.piece(token_id)
    # A token that is part of a character has no text of its own to take bytes from.
    encoded = None if _INCOMPLETE in piece else list(piece.encode())
    return {"token": piece, "logprob": max(logprob, _LOWEST), "bytes": encoded}


def completion_logprobs(model: ServedModel, entries: Sequence[TokenEntry]) -> dict[str, Any]:
    """Return the plain completions' form."""
    top_logprobs = []
    for entry in entries:
        top = zip(entry.logprob.top_ids, entry.logprob.top_logprobs, strict=True)
        best = {model.piece(token_id): max(logprob, _LOWEST) for token_id, logprob in top}
        if best:
            # The chosen token is always among them, be it one more than was asked for.
            best.setdefault(model.piece(entry.token_id), max(entry.logprob.logprob, _LOWEST))
        top_logprobs.append(best)
    return {
        "tokens": [model.piece(entry.token_id) for entry in entries],
        "token_logprobs": [max(entry.logprob.logprob, _LOWEST) for entry in entries],
        "top_logprobs": top_logprobs,
        "text_offset": [entry.offset for entry in entries],
    }
