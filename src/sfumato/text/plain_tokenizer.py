"""Tokenizers that need nothing but their `tokenizer.json`, read without transformers, which takes a second.

Where a checkpoint says anything that transformers gives a meaning of its own, there is none here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
# With one of these beside it a tokenizer is more than its file.
_OTHERS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates")
_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# What may be said of it: these say nothing that changes a text or a token.
_FIELDS = {
    *_NAMED,
    "added_tokens_decoder",
    "additional_special_tokens",
    "chat_template",
    "clean_up_tokenization_spaces",
    "model_max_length",
    "tokenizer_class",
}
# Beyond so many transformers looks for faults of single published tokenizers, and mends them.
_MENDED_VOCAB = 100_000
_MESSAGE_FIELDS = ("role", "content")
_VARIABLES = {"messages", "add_generation_prompt", *_NAMED}


class PlainTokenizer:
    """The file's own tokens, and a chat template that puts messages together and does nothing else."""

    def __init__(self, tokenizer: Any, chat_template: str | None, special: dict[str, str]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._template: Any = None
        self.chat_template = chat_template

    @classmethod
    def read(cls, path: Path) -> PlainTokenizer | None:
        """Return the tokenizer of a folder, or None where only transformers knows what it means."""
        try:
            content = json.loads((path / _FILE).read_text(encoding="utf-8"))
            config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if any((path / other).exists() for other in _OTHERS) or not _is_plain(content, config):
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path / _FILE))
        if tokenizer.get_vocab_size() > _MENDED_VOCAB:
            return None
        special = {name: config[name] for name in _NAMED if name in config}
        return cls(tokenizer, config.get("chat_template"), special)

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Return the text of token ids."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def special_tokens(self) -> dict[str, int]:
        """Return the ids of the tokens that are no text."""
        return special_tokens(self._tokenizer)

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """Return a conversation as text, ready for the assistant's answer. Raises ValueError for none.

        tools: never any, as such a template has no place for them.
        """
        if not messages:
            raise ValueError("there is no message")
        if self._template is None:
            self._template = _environment().from_string(self.chat_template or "")
        given = [
            {name: value for name, value in message.items() if value is not None} for message in messages
        ]
        return str(self._template.render(messages=given, add_generation_prompt=True, **self._special))


def _is_plain(content: Any, config: Any) -> bool:
    """Whether nothing is said beside the file that changes what it does."""
    if not isinstance(content, dict) or not isinstance(config, dict):
        return False
    names = [config[name] for name in _NAMED if name in config]
    added = {str(token["id"]): token for token in content.get("added_tokens") or ()}
    declared = {
        name: {**token, "id": int(name)} for name, token in config.get("added_tokens_decoder", {}).items()
    }
    special = {token["content"] for token in added.values() if token["special"]}
    template = config.get("chat_template")
    return (
        config.keys() <= _FIELDS
        and config.get("tokenizer_class") in _CLASSES
        and config.get("clean_up_tokenization_spaces") is False
        and content.get("truncation") is None
        and content.get("padding") is None
        and declared == added
        and all(isinstance(name, str) and name in special for name in names)
        and special >= set(config.get("additional_special_tokens", ()))
        and (template is None or (isinstance(template, str) and _only_substitutes(template)))
    )


def _only_substitutes(template: str) -> bool:
    """Whether a template reads roles and contents and calls nothing, so that every Jinja gives the same."""
    from jinja2 import TemplateSyntaxError, meta, nodes

    try:
        tree = _environment().parse(template)
    except TemplateSyntaxError:
        return False
    calls = (nodes.Call, nodes.Filter, nodes.FilterBlock, nodes.Test, nodes.Macro, nodes.Import)
    read = [
        node.arg.value if isinstance(node.arg, nodes.Const) else None for node in tree.find_all(nodes.Getitem)
    ]
    read += [node.attr for node in tree.find_all(nodes.Getattr)]
    return (
        meta.find_undeclared_variables(tree) <= _VARIABLES
        and next(iter(tree.find_all(calls)), None) is None
        and all(name in _MESSAGE_FIELDS or isinstance(name, int) for name in read)
    )


def _environment() -> Any:
    """Return Jinja as chat templates are written for."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of a `tokenizers.Tokenizer`'s special tokens."""
    return {
        added.content: number
        for number, added in tokenizer.get_added_tokens_decoder().items()
        if added.special
    }
