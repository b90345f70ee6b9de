"""Reading a foreign config.json: every missing or odd field is an error that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.errors import CheckpointError


class Fields:
    """Typed access to the fields of one config.json."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def integer(self, name: str) -> int:
        """Return a required positive integer."""
        value = self.optional_integer(name)
        if value is None:
            raise CheckpointError(f"config.json: field {name!r} is missing")
        return value

    def optional_integer(self, name: str) -> int | None:
        """Return an integer, or None where the field is absent or null."""
        value = self.config.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(
                f"config.json: field {name!r} is {value!r}, expected a non-negative integer"
            )
        return value

    def number(self, name: str, default: float) -> float:
        """Return a positive number."""
        value = self.config.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(f"config.json: field {name!r} is {value!r}, expected a positive number")
        return float(value)

    def expect(self, name: str, value: object) -> None:
        """Refuse a value that would need another forward pass; an absent field is the known value."""
        found = self.config.get(name, value)
        if found is None and value is False:
            return
        if found != value:
            raise CheckpointError(f"config.json: {name} = {found!r} is not supported, only {value!r}")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Return a field that holds one token id, a list of them, or nothing."""
        value = self.config.get(name)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            raise CheckpointError(f"config.json: field {name!r} is {value!r}, expected token ids")
        return tuple(ids)

    def from_tokenizer(
        self, name: str, added_tokens: Mapping[str, int], spellings: tuple[str, ...], known: int | None
    ) -> int:
        """Return an id that config.json lacks: the tokenizer's, else the family's known one."""
        for spelling in spellings:
            if spelling in added_tokens:
                return added_tokens[spelling]
        vocab_size = self.config.get("vocab_size", 0)
        if known is not None and known < vocab_size:
            return known
        raise CheckpointError(
            f"config.json: field {name!r} is missing, the tokenizer has none of {', '.join(spellings)}, "
            f"and the family's usual id {known} is outside the vocabulary of {vocab_size}; "
            f"give it with --{name.replace('_', '-')}"
        )
