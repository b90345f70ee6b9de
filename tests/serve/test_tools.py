"""Tools with the official client: calls that are forced, named, free; conversations that hold calls."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from openai import BadRequestError, OpenAI

from sfumato.serve.tools import CallStream, Function, with_tools
from tests.serve.running import LLADA, SDAR

MESSAGES: list[Any] = [{"role": "user", "content": "Mia, 34, nurse in Oslo"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
UNKNOWN = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
CLOCK = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "clock", "parameters": CLOCK}},
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
SCHEMAS = {"weather": WEATHER, "clock": CLOCK}


def ask(client: OpenAI, model: str = SDAR, **fields: Any) -> Any:
    """Ask with both tools."""
    given = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 160, "seed": 5, "temperature": 1.0}
    return client.chat.completions.create(model=model, **{**given, **fields})


def check(calls: Any) -> None:
    """Check the arguments of calls against their schemas."""
    assert calls
    for call in calls:
        assert call.id.startswith("call_")
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("model", [SDAR, LLADA])
def test_a_call_that_is_required(client: OpenAI, model: str) -> None:
    (choice,) = ask(client, model, tool_choice="required", parallel_tool_calls=False).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert len(choice.message.tool_calls) == 1
    check(choice.message.tool_calls)


def test_a_call_by_name(client: OpenAI) -> None:
    named = {"type": "function", "function": {"name": "clock"}}
    (choice,) = ask(client, tool_choice=named).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["clock"]
    assert choice.message.tool_calls[0].function.arguments == "{}"
    assert choice.finish_reason == "tool_calls"


def test_a_stream_brings_whole_calls(client: OpenAI) -> None:
    with ask(client, tool_choice="required", parallel_tool_calls=False, stream=True) as stream:
        chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    calls = [call for choice in chunks for call in choice.delta.tool_calls or ()]
    assert [call.index for call in calls] == [0]
    check(calls)
    assert not any(choice.delta.content for choice in chunks)
    assert chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_free_to_answer_or_to_call(client: OpenAI, temperature: float) -> None:
    (choice,) = ask(client, temperature=temperature).choices
    if choice.message.tool_calls:
        check(choice.message.tool_calls)
    else:
        assert choice.finish_reason in ("stop", "length")
        assert "<tool_call>" not in choice.message.content


def test_none_and_no_tools_answer_as_ever(client: OpenAI) -> None:
    plain = ask(client, tools=None, temperature=0).choices[0].message.content
    assert ask(client, tool_choice="none", temperature=0).choices[0].message.content == plain
    assert ask(client, tools=[], temperature=0).choices[0].message.content == plain


def test_a_conversation_with_a_call_and_its_result_goes_on(client: OpenAI) -> None:
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:30"},
    ]
    alone, behind = (ask(client, messages=each, max_tokens=8).usage for each in (MESSAGES, messages))
    assert behind.prompt_tokens > alone.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tool_choice": "required", "tools": []}, "tool_choice", "there are no tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "'x', which is no tool",
        ),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools", "one name"),
        ({"response_format": {"type": "json_object"}}, "tools", "do not go together"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages[0]", "role tool"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0]", "assistant"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": UNKNOWN}}]},
            "tools",
            "tools: the schema keyword 'uniqueItems' is not supported",
        ),
    ],
)
def test_what_is_refused(client: OpenAI, fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        ask(client, **fields)
    assert caught.value.param == param


def test_calls_are_taken_out_of_a_text_that_comes_in_pieces() -> None:
    text = (
        'Let me see <b.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ö}</tool_call>"}}\n'
        "</tool_call>\n"
        '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    )
    for width in (1, 2, 3, 7, 50, len(text)):
        stream, shown = CallStream(), ""
        pieces = [text[start : start + width] for start in range(0, len(text), width)]
        for index, piece in enumerate(pieces):
            shown += stream.push(piece, is_last=index == len(pieces) - 1)[0]
        assert shown.rstrip("\n") == "Let me see <b."
        assert [call["function"]["name"] for call in stream.calls] == ["weather", "clock"]
        assert stream.calls[0]["function"]["arguments"] == '{"city": "Ö}</tool_call>"}'


def test_a_text_without_calls_is_shown_whole() -> None:
    stream = CallStream()
    shown = [stream.push(piece)[0] for piece in ("a <to", "ol_call", " b <", "tool")]
    shown.append(stream.push("", is_last=True)[0])
    assert "".join(shown) == "a <tool_call b <tool"


def test_templates_without_tools_are_told_in_text() -> None:
    functions = [Function(name="clock")]
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": {}}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ]
    told, tools = with_tools(messages, functions, knows_tools=False)
    assert tools is None
    assert told[0]["content"].startswith("Be kind.\n\nYou may call functions.")
    assert told[1]["content"] == '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    assert told[2] == {"role": "user", "content": "<tool_response>\nnoon\n</tool_response>"}
    assert with_tools(messages, functions, knows_tools=True)[0] is messages
