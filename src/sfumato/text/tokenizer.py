"""Text to tokens and back: a checkpoint's tokenizer, its chat template, text that grows by tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from sfumato.errors import CheckpointError, RequestError
from sfumato.text.plain_tokenizer import PlainTokenizer, special_tokens

# What a decoder prints for bytes that do not yet form a character.
_INCOMPLETE = "\ufffd"


class ThroughTransformers:
    """A tokenizer as transformers understands its folder; no code of the checkpoint runs."""

    def __init__(self, path: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        self.chat_template = self._tokenizer.chat_template

    def __len__(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Return the text of token ids."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def special_tokens(self) -> dict[str, int]:
        """Return the ids of the tokens that are no text."""
        return special_tokens(self._tokenizer.backend_tokenizer)

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """Return a conversation as text, ready for the assistant's answer."""
        text = self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True
        )
        return str(text)


class Tokenizer:
    """A checkpoint's tokenizer and chat template: its file alone where that says all, else transformers."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = PlainTokenizer.read(path) or ThroughTransformers(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: the tokenizer cannot be read: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Return how many tokens the tokenizer knows, added ones among them."""
        return len(self._tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be turned into a prompt."""
        return bool(self._tokenizer.chat_template)

    @property
    def chat_template(self) -> str:
        """Return the template as it is written, empty where there is none."""
        return str(self._tokenizer.chat_template or "")

    @property
    def special_tokens(self) -> dict[str, int]:
        """Return the ids of the tokens that decoding leaves out."""
        return self._tokenizer.special_tokens()

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template has a place for tools."""
        return "tools" in self.chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def piece(self, token_id: int) -> str:
        """Return the text of one token, special tokens included."""
        return self.decode([token_id], skip_special_tokens=False)

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Return the prompt of a conversation, ready for the assistant's answer.

        Raises RequestError if there is no template or it refuses the messages.
        """
        if not self.has_chat_template:
            raise RequestError("this model has no chat template; use /v1/completions", field="messages")
        from jinja2.exceptions import TemplateError

        try:
            text = self._tokenizer.render(list(messages), tools)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise RequestError(
                f"the chat template refuses the messages: {error}", field="messages"
            ) from error
        return self.encode(text, add_special_tokens=False)


class TextStream:
    """Text that grows as tokens are committed; a character whose bytes are incomplete is held back.

    shown_tokens: special tokens that are shown; the others are left out.
    """

    def __init__(self, tokenizer: Tokenizer, shown_tokens: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        # Special tokens that are left out, where some of them are shown.
        self._hidden: frozenset[int] | None = None
        if shown_tokens:
            special = tokenizer.special_tokens.items()
            self._hidden = frozenset(number for token, number in special if token not in shown_tokens)
        # Tokens [prefix, read) are decoded again with what follows: spaces depend on neighbours.
        self._prefix = 0
        self._read = 0

    def push(self, token_ids: Sequence[int], *, is_last: bool = False) -> str:
        """Add tokens and return the text that is complete now."""
        self._token_ids.extend(token_ids)
        known = self._decode(self._token_ids[self._prefix : self._read])
        text = self._decode(self._token_ids[self._prefix :])
        if text.endswith(_INCOMPLETE) and not is_last:
            return ""
        self._prefix, self._read = self._read, len(self._token_ids)
        return text[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        if self._hidden is None:
            return self._tokenizer.decode(token_ids)
        shown = [token_id for token_id in token_ids if token_id not in self._hidden]
        return self._tokenizer.decode(shown, skip_special_tokens=False)


class StopStrings:
    """Cuts a growing text at the first stop string, and holds back what could still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str, *, is_last: bool = False) -> tuple[str, bool]:
        """Add text; return what may be shown and whether a stop string was met."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = 0 if is_last else self._longest_start()
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown, False

    def _longest_start(self) -> int:
        """Return the length of the longest end of the text that is the start of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0
