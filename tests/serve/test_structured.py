"""Answers that obey a form, asked for with the official client."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel

from tests.serve.running import BARE, LLADA, SDAR

MESSAGES: list[Any] = [{"role": "user", "content": "Mia, 34, nurse in Oslo"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 16}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Person(BaseModel):
    name: str
    age: int


def format_of(schema: Any, *, strict: bool | None = True) -> Any:
    """Return a response_format."""
    return {"type": "json_schema", "json_schema": {"name": "person", "strict": strict, "schema": schema}}


def ask(client: OpenAI, model: str = SDAR, **fields: Any) -> Any:
    """Ask for a chat completion of at most 96 tokens."""
    return client.chat.completions.create(
        model=model, messages=MESSAGES, **{"max_tokens": 96, "seed": 3, **fields}
    )


@pytest.mark.parametrize("model", [SDAR, LLADA])
@pytest.mark.parametrize(("strict", "temperature"), [(True, 0.0), (None, 5.0), (False, 0.7)])
def test_a_schema_is_obeyed(client: OpenAI, model: str, strict: bool | None, temperature: float) -> None:
    fields = {"response_format": format_of(SCHEMA, strict=strict), "temperature": temperature}
    (choice,) = ask(client, model, **fields).choices
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    with ask(client, model, **fields, stream=True) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == choice.message.content


def test_the_clients_own_parsing_works(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=SDAR, messages=MESSAGES, response_format=Person, max_tokens=128, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_json_of_any_kind(client: OpenAI) -> None:
    (choice,) = ask(client, response_format={"type": "json_object"}, max_tokens=160).choices
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": r"\d{3}-[a-f]+!"}, r"\d{3}-[a-f]+!"),
        ({"choice": ["red", "green", 'a "quoted" one\\']}, 'red|green|a "quoted" one\\\\'),
        ({"grammar": 'start: "(" /[01]/+ ")"'}, r"\([01]+\)"),
    ],
    ids=["regex", "choice", "grammar"],
)
def test_ours_in_chat_and_plain_completions(client: OpenAI, fields: dict[str, Any], pattern: str) -> None:
    texts = [ask(client, n=3, temperature=1.0, extra_body=fields).choices]
    texts.append(
        client.completions.create(
            model=SDAR, prompt="It is", max_tokens=96, temperature=1.0, n=3, extra_body=fields
        ).choices
    )
    for choices in texts:
        for choice in choices:
            text = choice.message.content if hasattr(choice, "message") else choice.text
            assert choice.finish_reason == "length" or re.fullmatch(pattern, text), text


def test_log_probabilities_go_with_a_grammar(client: OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=2, response_format=format_of(SCHEMA))
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries).strip().startswith("{")
    assert all(entry.logprob <= 1e-5 for entry in entries)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "do not go together"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        (
            {"response_format": format_of({"type": "array", "uniqueItems": True})},
            "response_format",
            "'uniqueItems' is not supported",
        ),
        ({"regex": "a("}, "regex", "unclosed group"),
        ({"regex": "a", "choice": ["b"]}, "choice", "do not go together"),
        ({"choice": []}, "choice", "at least 1"),
        ({"grammar": "nothing"}, "grammar", "grammar"),
        ({"regex": "a", "ignore_eos": True}, "regex", "ignore_eos"),
    ],
)
def test_what_is_refused(client: OpenAI, fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        ask(client, extra_body=fields)
    assert caught.value.param == param


def test_a_model_without_a_tokenizer_refuses(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="no tokenizer"):
        client.completions.create(model=BARE, prompt=[1, 2, 3], max_tokens=4, extra_body={"regex": "a"})
