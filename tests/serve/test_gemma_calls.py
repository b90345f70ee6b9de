"""Calls in Gemma 4's form: rules from schemas, values read back, and a server that answers with them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.core.spec import Grammar
from sfumato.errors import NotSupported, RequestError
from sfumato.serve.gemma_schema import calls_of
from sfumato.serve.gemma_values import read_call
from sfumato.serve.tool_formats import GemmaCalls, Signature, TaggedJson, format_of
from sfumato.serve.tools import CallStream
from sfumato.text.grammars import Grammars
from sfumato.text.tokenizer import TextStream, Tokenizer
from tests.models.gemma_folder import write_gemma
from tests.serve.running import serving
from tests.text.test_constraint import schemas

VOCAB, END = 320, 1
TRIP = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "stops": {"type": "array", "items": {"enum": ["sea", "hills", 3, None]}, "maxItems": 2},
        "class": {"anyOf": [{"const": True}, {"type": "number", "minimum": 0, "maximum": 1}]},
    },
    "required": ["city", "days"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny DiffusionGemma."""
    return write_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def grammars(folder: Path) -> Grammars:
    """Read its tokenizer as automata see it."""
    return Grammars(folder, vocab_size=VOCAB, end_ids=(END,))


def drawn(grammars: Grammars, tokenizer: Tokenizer, source: str, seed: int, most: int = 600) -> str | None:
    """Return the text of random tokens that a grammar allows, None where they do not end."""
    matcher = grammars.matcher(Grammar(kind="tools", source=source))
    rng, bits = random.Random(seed), np.zeros(-(-VOCAB // 32), dtype=np.int32)
    stream, text = TextStream(tokenizer, GemmaCalls().special_tokens), ""
    for _ in range(most):
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[:VOCAB])
        assert allowed.size, matcher.get_error()
        token = END if END in allowed else int(rng.choice(allowed))
        # Strings end at last.
        token = 11 if 11 in allowed and rng.random() < 0.3 else token
        if token == END:
            return text + stream.push((), is_last=True)
        assert matcher.consume_token(token)
        text += stream.push((token,))
    return None


def check_schema(grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any], seed: int) -> bool:
    """Draw one call of a function with this schema, read it back and check it."""
    text = drawn(grammars, tokenizer, f"start: call\n{calls_of([('do', schema)])}", seed)
    if text is None:
        return False
    found = read_call(text, 0)
    assert found is not None, text
    start, end, name, arguments = found
    assert (start, end, name) == (0, len(text), "do")
    jsonschema.validate(arguments, schema)
    return True


@pytest.mark.parametrize("seed", range(20))
def test_calls_obey_their_schema(folder: Path, grammars: Grammars, seed: int) -> None:
    assert check_schema(grammars, Tokenizer(folder), TRIP, seed)


def objects() -> st.SearchStrategy[dict[str, Any]]:
    """Return schemas of arguments."""
    names = st.sampled_from(["a", "bc", "name", "x_y"])
    fields = st.dictionaries(names, schemas, min_size=1, max_size=4)
    return fields.flatmap(
        lambda properties: st.lists(st.sampled_from(sorted(properties)), unique=True).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": required,
                "additionalProperties": False,
            }
        )
    )


@settings(max_examples=100, deadline=None)
@given(schema=objects(), seed=st.integers(0, 10**6))
def test_random_schemas(folder: Path, grammars: Grammars, schema: dict[str, Any], seed: int) -> None:
    check_schema(grammars, Tokenizer(folder), schema, seed)


@pytest.mark.slow
@settings(max_examples=3_000, deadline=None)
@given(schema=objects(), seed=st.integers(0, 10**6))
def test_thousands_of_schemas(folder: Path, grammars: Grammars, schema: dict[str, Any], seed: int) -> None:
    check_schema(grammars, Tokenizer(folder), schema, seed)


def test_a_schema_may_hold_itself(folder: Path, grammars: Grammars) -> None:
    schema = {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/tree"}},
        "required": ["tree"],
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"leaf": {"type": "boolean"}, "next": {"$ref": "#/$defs/tree"}},
                "required": ["leaf"],
            }
        },
    }
    assert any(check_schema(grammars, Tokenizer(folder), schema, seed) for seed in range(5))


def with_a(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of arguments that has one property."""
    return {"type": "object", "properties": {"a": schema}}


@pytest.mark.parametrize(
    ("schema", "error", "message"),
    [
        (
            {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
            NotSupported,
            "uniqueItems",
        ),
        ({"type": "object", "properties": {"a": {"allOf": []}}}, NotSupported, "allOf"),
        (
            {"type": "object", "properties": {"a": {"type": "string", "format": "regex"}}},
            NotSupported,
            "'regex'",
        ),
        ({"type": "object", "required": ["b"]}, NotSupported, "'b' is required"),
        (with_a({"$ref": "#/$defs/x"}), RequestError, "leads nowhere"),
        ({"type": "array"}, RequestError, "no object"),
        (with_a({"type": "date"}), RequestError, "'date' is no type"),
    ],
)
def test_what_has_no_form_is_refused_by_name(
    schema: dict[str, Any], error: type[RequestError], message: str
) -> None:
    with pytest.raises(error, match=message) as refused:
        calls_of([("do", schema)])
    assert refused.value.field == "tools"


def test_values_are_read_back() -> None:
    text = (
        'Well.<|tool_call>call:do{a:<|"|>x}, {<|"|>,b:[1,-2.5,<|"|><|"|>],'
        "c:{d:null,e:true},f:[],g:{}}<tool_call|>"
        "<|tool_call>call:stop{}<tool_call|>"
    )
    wanted = {"a": "x}, {", "b": [1, -2.5, ""], "c": {"d": None, "e": True}, "f": [], "g": {}}
    for width in (1, 2, 5, 17, len(text)):
        stream, shown = CallStream(GemmaCalls()), ""
        for start in range(0, len(text), width):
            shown += stream.push(text[start : start + width], is_last=start + width >= len(text))[0]
        assert shown == "Well."
        assert [call["function"]["name"] for call in stream.calls] == ["do", "stop"]
        assert json.loads(stream.calls[0]["function"]["arguments"]) == wanted
    for broken in (
        '<|tool_call>call:do{a:<|"|>x}<tool_call|>',
        "<|tool_call>call:do{a:1,",
        "call:do{}<tool_call|>",
    ):
        assert read_call(broken, 0) is None


def test_the_template_says_which_form_a_model_speaks(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert isinstance(format_of(tokenizer), GemmaCalls)
    zoo = Tokenizer(Path(__file__).resolve().parents[2] / "src" / "sfumato" / "zoo" / "sfumato-tiny-sdar")
    assert format_of(zoo) == TaggedJson()


def test_tags_may_be_special_tokens(folder: Path) -> None:
    form = TaggedJson(frozenset(("<tool_call>", "</tool_call>")))
    for must_call in (True, False):
        source = form.grammar([Signature("do", None)], must_call=must_call, is_parallel=True).source
        assert "call: <tool_call> rest" in source
        assert '"\\n" </tool_call>' in source


def test_a_server_answers_with_calls(folder: Path, tmp_path: Path) -> None:
    tools: Any = [{"type": "function", "function": {"name": "trip", "parameters": TRIP}}]
    asked: list[Any] = [{"role": "user", "content": "To the sea"}]
    with serving(tmp_path, str(folder), "--dtype", "float32") as server, server.client() as openai:
        (model,) = openai.models.list().data
        fields: dict[str, Any] = {"model": model.id, "tools": tools, "seed": 3, "max_tokens": 400}
        few = {"algorithm": "entropy_bound", "algorithm_parameters": {"max_denoising_steps": 4}}
        fields["extra_body"] = few
        answer = openai.chat.completions.create(messages=asked, tool_choice="required", **fields)
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        for call in choice.message.tool_calls or ():
            assert call.type == "function"
            jsonschema.validate(json.loads(call.function.arguments), TRIP)
        message = choice.message.model_dump(exclude_none=True)
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "booked"}
        after = openai.chat.completions.create(
            messages=[*asked, message, result], tool_choice="none", **{**fields, "max_tokens": 16}
        )
        assert after.choices[0].finish_reason in ("stop", "length")
