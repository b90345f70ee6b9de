"""What an answer must obey, as requests say it: OpenAI's response_format, and regex, choice, grammar."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sfumato.core.spec import Grammar
from sfumato.serve.errors import bad_request

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class JsonSchema(BaseModel):
    """A schema with a name; every answer obeys it, `strict` or not."""

    model_config = _STRICT

    name: Annotated[str, Field(min_length=1, max_length=64)]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """text, json_object, or json_schema with its schema."""

    model_config = _STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        """Return what it asks for. Raises ApiError where the type and the schema do not go together."""
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise bad_request(
                f"response_format of type {self.type!r} and json_schema do not go together", "response_format"
            )
        if self.json_schema is not None:
            # A schema that says nothing: any JSON.
            return Grammar(kind="json_schema", source=json.dumps(self.json_schema.schema_ or {}))
        return Grammar(kind="json_object") if self.type == "json_object" else None


Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000)]


def grammar_of(
    response_format: ResponseFormat | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> Grammar | None:
    """Return the one grammar that a request asks for, or None. Raises ApiError where it asks for several."""
    found = {
        "response_format": None if response_format is None else response_format.grammar(),
        "regex": None if regex is None else Grammar(kind="regex", source=regex),
        "choice": None if choice is None else Grammar(kind="choice", source=json.dumps(choice)),
        "grammar": None if grammar is None else Grammar(kind="lark", source=grammar),
    }
    given = [name for name, each in found.items() if each is not None]
    if len(given) > 1:
        raise bad_request(f"{' and '.join(given)} do not go together; give one of them", given[1])
    return found[given[0]] if given else None
