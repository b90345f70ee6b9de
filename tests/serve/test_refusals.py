"""What is not served is refused by name, in OpenAI's form; every documented field is known."""

from __future__ import annotations

import json
import typing
from typing import Any

import pytest
from openai.types import completion_create_params as plain_types
from openai.types.chat import completion_create_params as chat_types
from pydantic import ValidationError

from sfumato.serve.schema import ChatRequest, CompletionRequest, TextRequest
from tests.serve.running import SDAR, Server

CHAT: dict[str, Any] = {"model": SDAR, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
PLAIN: dict[str, Any] = {"model": SDAR, "prompt": "hi", "max_tokens": 2}
BODIES = {"/v1/chat/completions": CHAT, "/v1/completions": PLAIN}

# Every documented field with a value that we do not serve.
REFUSED_CHAT: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "frequency_penalty": 0.5,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "moderation": {},
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": -0.5,
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "service_tier": "flex",
    "store": True,
    "verbosity": "high",
    "web_search_options": {},
}
REFUSED_PLAIN: dict[str, Any] = {
    "best_of": 3,
    "frequency_penalty": 1,
    "presence_penalty": 1,
    "suffix": "the end",
}
NEUTRAL_CHAT: dict[str, Any] = {
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "prompt_cache_retention": "in_memory",
    "reasoning_effort": "none",
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "store": False,
    "tool_choice": "auto",
    "tools": [],
    "verbosity": "medium",
    "user": "someone",
    "metadata": {"a": "b"},
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "logprobs": False,
    "n": 1,
    "stop": [],
    "stream": False,
}
NEUTRAL_PLAIN: dict[str, Any] = {"best_of": 1, "suffix": "", "echo": False, "n": 1, "stop": []}


def documented(types: Any) -> set[str]:
    return {
        name
        for kind in ("CompletionCreateParamsNonStreaming", "CompletionCreateParamsStreaming")
        for name in typing.get_type_hints(getattr(types, kind))
    }


@pytest.mark.parametrize(("types", "schema"), [(chat_types, ChatRequest), (plain_types, CompletionRequest)])
def test_every_documented_field_is_known_and_null_is_legal(types: Any, schema: type[TextRequest]) -> None:
    fields = documented(types)
    assert fields <= set(schema.model_fields)
    body = CHAT if schema is ChatRequest else PLAIN
    required = {"model", "messages", "prompt"}
    schema.model_validate(body | dict.fromkeys(fields - required))


@pytest.mark.parametrize("name", REFUSED_CHAT)
def test_chat_refuses_by_name(server: Server, name: str) -> None:
    refused(server, "/v1/chat/completions", {name: REFUSED_CHAT[name]}, param=name)


@pytest.mark.parametrize("name", REFUSED_PLAIN)
def test_completions_refuse_by_name(server: Server, name: str) -> None:
    refused(server, "/v1/completions", {name: REFUSED_PLAIN[name]}, param=name)


def test_every_documented_field_works_or_is_refused() -> None:
    working = {
        "messages",
        "model",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "max_tokens",
        "n",
        "seed",
        "stop",
    }
    working |= {
        "response_format",
        "max_completion_tokens",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
    }
    working |= {"tools", "tool_choice", "parallel_tool_calls"}
    labels = {"user", "metadata", "prompt_cache_key", "safety_identifier"}
    assert documented(chat_types) == working | labels | set(REFUSED_CHAT)
    working |= {"prompt", "echo"}
    assert documented(plain_types) <= working | labels | set(REFUSED_PLAIN)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", NEUTRAL_CHAT),
        ("/v1/completions", NEUTRAL_PLAIN),
    ],
)
def test_neutral_values_are_legal(server: Server, path: str, fields: dict[str, Any]) -> None:
    answer = server.http.post(path, json=BODIES[path] | fields)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"seed": 1 << 64}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"stop_token_ids": [100000]}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        (
            {"stream": True, "stream_options": {"include_everything": True}},
            "stream_options.include_everything",
        ),
        ({"algorithm": "guess"}, "algorithm"),
        ({"algorithm": "low_confidence", "algorithm_parameters": {"temp": 1}}, "algorithm_parameters.temp"),
        (
            {"algorithm": "low_confidence", "algorithm_parameters": {"threshold": -1}},
            "algorithm_parameters.threshold",
        ),
        ({"algorithm_parameters": [1]}, "algorithm_parameters"),
        ({"block_length": 7}, "block_length"),
        ({"timeout": 0}, "timeout"),
        ({"priority": "high"}, "priority"),
        ({"model": None}, "model"),
    ],
)
def test_wrong_values_name_the_field(server: Server, path: str, fields: dict[str, Any], param: str) -> None:
    refused(server, path, fields, param=param)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x", "mood": 1}]},
            "messages[0].mood",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/chat/completions", {"max_completion_tokens": 3}, "max_tokens"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": ["a", [1]]}, "prompt"),
        ("/v1/completions", {"prompt": [1.5]}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": [100000]}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 600}, "prompt"),
        ("/v1/completions", {"prompt": "\ud800"}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 100, "n": 100}, "prompt"),
    ],
)
def test_wrong_prompts_name_the_field(server: Server, path: str, fields: dict[str, Any], param: str) -> None:
    refused(server, path, fields, param=param)


def refused(server: Server, path: str, fields: dict[str, Any], *, param: str) -> None:
    # The body is written with escapes, so that halves of characters reach the server.
    answer = server.http.post(
        path, content=json.dumps(BODIES[path] | fields), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


def test_a_body_that_is_no_object(server: Server) -> None:
    for content in ("{", "[]", "", "null"):
        answer = server.http.post(
            "/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
        assert "error" in answer.json()
    number = PLAIN | {"temperature": "NaN"}
    answer = server.http.post(
        "/v1/completions",
        content=json.dumps(number).replace('"NaN"', "NaN"),
        headers={"Content-Type": "application/json"},
    )
    assert answer.json()["error"]["param"] == "temperature"


def test_the_schema_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate(CHAT | {"anything": 1})
