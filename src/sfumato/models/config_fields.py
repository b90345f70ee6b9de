"""Reading a foreign config.json: every missing or odd field is an error that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.errors import CheckpointError


class Fields:
    """Typed access to the fields of one config.json, or of an object in it, whose name errors then show."""

    def __init__(self, config: Mapping[str, Any], prefix: str = "") -> None:
        self.config = config
        self._prefix = prefix

    def nested(self, name: str) -> Fields:
        """Return the fields of a required object."""
        value = self.config.get(name)
        if value is None:
            self.require(name)
        if not isinstance(value, Mapping):
            raise self.error(name, "expected an object")
        return Fields(value, f"{self._prefix}{name}.")

    def require(self, *names: str) -> None:
        """Raise one error that names every field of `names` that is absent or null."""
        missing = [repr(self._prefix + name) for name in names if self.config.get(name) is None]
        if missing:
            are = "fields {} are" if len(missing) > 1 else "field {} is"
            raise CheckpointError(f"config.json: {are.format(', '.join(missing))} missing")

    def error(self, name: str, expected: str) -> CheckpointError:
        """Return an error about a field's value."""
        found = self.config.get(name)
        return CheckpointError(f"config.json: field {self._prefix + name!r} is {found!r}, {expected}")

    def integer(self, name: str) -> int:
        """Return a required positive integer."""
        self.require(name)
        value = self.optional_integer(name)
        if not value:
            raise self.error(name, "expected a positive integer")
        return value

    def optional_integer(self, name: str) -> int | None:
        """Return an integer, or None where the field is absent or null."""
        value = self.config.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(name, "expected a non-negative integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive number; required where there is no default."""
        value = self.config.get(name)
        if value is None and default is not None:
            return default
        self.require(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.error(name, "expected a positive number")
        return float(value)

    def boolean(self, name: str) -> bool:
        """Return a required truth value."""
        self.require(name)
        value = self.config[name]
        if not isinstance(value, bool):
            raise self.error(name, "expected true or false")
        return value

    def head_layout(self) -> tuple[int, int, int]:
        """Return how many query heads and key-value heads there are, and their width."""
        heads, width = self.integer("num_attention_heads"), self.integer("hidden_size")
        kv_heads = self.optional_integer("num_key_value_heads") or heads
        if heads % kv_heads:
            raise self.error("num_key_value_heads", f"expected a divisor of num_attention_heads {heads}")
        head_dim = self.optional_integer("head_dim")
        if head_dim is None and width % heads:
            raise self.error("hidden_size", f"expected a multiple of num_attention_heads {heads}")
        return heads, kv_heads, head_dim or width // heads

    def rotary_theta(self, default: float | None = None) -> float:
        """Return `rope_theta`, which newer files write inside `rope_parameters`."""
        nested = self.rotary_parameters()
        source = nested if self.config.get("rope_theta") is None and nested.config else self
        return source.number("rope_theta", default)

    def rotary_parameters(self) -> Fields:
        """Return `rope_parameters`, which may be absent; another kind of positions than plain is refused."""
        if self.config.get("rope_parameters") is None:
            return Fields({}, f"{self._prefix}rope_parameters.")
        parameters = self.nested("rope_parameters")
        parameters.expect("rope_type", "default")
        return parameters

    def expect(self, name: str, value: object) -> None:
        """Refuse a value that would need another forward pass; an absent field is the known value."""
        found = self.config.get(name, value)
        if found is None and value is False:
            return
        if found != value:
            shown = self._prefix + name
            raise CheckpointError(f"config.json: {shown} = {found!r} is not supported, only {value!r}")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Return a field that holds one token id, a list of them, or nothing."""
        value = self.config.get(name)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            raise self.error(name, "expected token ids")
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
