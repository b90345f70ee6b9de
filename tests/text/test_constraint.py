"""Grammars on canvases without a model: whatever is guessed, what comes out is valid."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.core.plan import Decision
from sfumato.core.spec import Decoding, Grammar, TextSpec
from sfumato.errors import RequestError
from sfumato.models.folder import read_folder
from sfumato.text.canvas import Canvas, make_canvas
from sfumato.text.constraint import Constraint
from sfumato.text.grammars import FIELDS, Grammars
from sfumato.text.random_source import CounterSource
from sfumato.text.tokenizer import Tokenizer

FOLDER = read_folder("sfumato-tiny-sdar")
TRAITS = FOLDER.traits
TOKENIZER = Tokenizer(FOLDER.path)
GRAMMARS = Grammars(FOLDER.path, vocab_size=TRAITS.vocab_size, end_ids=TRAITS.eos_token_ids)
MAX_TOKENS = 512


def canvas_of(max_tokens: int = MAX_TOKENS) -> Canvas:
    """Return an empty canvas behind a short prompt."""
    spec = TextSpec(
        prompt_ids=(5, 6, 7), max_tokens=max_tokens, block_length=16, decoding=Decoding(algorithm="llada")
    )
    return make_canvas(spec, TRAITS, CounterSource(0))


def run(grammar: Grammar, seed: int, sureness: float) -> str | None:
    """Decide at random until the end token; return the text, None where there was no room for it."""
    rng, canvas = random.Random(seed), canvas_of()
    constraint = Constraint(
        GRAMMARS.matcher(grammar),
        vocab_size=TRAITS.vocab_size,
        end_ids=TRAITS.eos_token_ids,
        field=FIELDS[grammar.kind],
    )
    while not canvas.is_complete:
        span = slice(canvas.block_start, canvas.block_end)
        tokens = np.array([rng.randrange(TRAITS.vocab_size) for _ in range(span.stop - span.start)])
        frontier = constraint.follow(canvas)
        allowed = np.flatnonzero(constraint.allowed())
        assert allowed.size
        tokens[frontier - span.start] = int(rng.choice(allowed))
        decision = constraint.restrict(
            canvas,
            Decision(
                start=span.start,
                tokens=tokens,
                transfer=canvas.undecided[span] & np.array([rng.random() < sureness for _ in tokens]),
                confidence=np.ones(len(tokens)),
            ),
        )
        assert decision.transfer[frontier - span.start]
        chosen = span.start + np.flatnonzero(decision.transfer)
        canvas.write(chosen, decision.tokens[chosen - span.start])
        ends = np.flatnonzero(np.isin(canvas.token_ids[canvas.prompt_len :], TRAITS.eos_token_ids))
        if ends.size:
            return TOKENIZER.decode(
                canvas.token_ids[canvas.prompt_len : canvas.prompt_len + ends[0]].tolist()
            )
        if not canvas.undecided[span].any():
            canvas.commit_block()
    return None


names = st.sampled_from(["a", "bc", "name", "x y", 'q"uote', "ünï"])
scalars = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda low, width: {"type": "integer", "minimum": low, "maximum": low + width},
        st.integers(-50, 50),
        st.integers(0, 200),
    ),
    st.builds(
        lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
        st.integers(0, 3),
        st.integers(0, 6),
    ),
    st.sampled_from(["[a-z]{1,4}", "[0-9]{2}-[0-9]{2}", "(x|yy)?z"]).map(
        lambda pattern: {"type": "string", "pattern": f"^{pattern}$"}
    ),
    st.lists(st.one_of(st.integers(-5, 5), names, st.none()), min_size=1, max_size=4, unique_by=repr).map(
        lambda values: {"enum": values}
    ),
    names.map(lambda value: {"const": value}),
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return schemas of objects with some of their fields required."""
    return st.dictionaries(names, inner, max_size=3).flatmap(
        lambda fields: (
            st.lists(st.sampled_from(sorted(fields)), unique=True).map(
                lambda required: {
                    "type": "object",
                    "properties": fields,
                    "required": required,
                    "additionalProperties": False,
                }
            )
            if fields
            else st.just({"type": "object", "additionalProperties": False})
        )
    )


def lists(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return schemas of short lists."""
    return st.builds(
        lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)
    )


schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        objects(inner),
        lists(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=6,
)


def check_schema(schema: Any, seed: int, sureness: float) -> None:
    """Run one schema and check what came of it."""
    text = run(Grammar(kind="json_schema", source=json.dumps(schema)), seed, sureness)
    if text is not None:
        jsonschema.validate(json.loads(text), schema)


@settings(max_examples=150, deadline=None)
@given(schema=schemas, seed=st.integers(0, 10**6), sureness=st.floats(0, 1))
def test_every_finished_answer_obeys_its_schema(schema: Any, seed: int, sureness: float) -> None:
    check_schema(schema, seed, sureness)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(schema=schemas, seed=st.integers(0, 10**6), sureness=st.floats(0, 1))
def test_ten_thousand_schemas(schema: Any, seed: int, sureness: float) -> None:
    check_schema(schema, seed, sureness)


def instance_of(schema: Any, rng: random.Random) -> Any:
    """Return a value that obeys a schema of the kinds above."""
    if "anyOf" in schema:
        return instance_of(rng.choice(schema["anyOf"]), rng)
    if "enum" in schema or "const" in schema:
        return rng.choice(schema.get("enum") or [schema["const"]])
    match schema["type"]:
        case "null":
            return None
        case "boolean":
            return rng.random() < 0.5
        case "integer":
            return rng.randint(schema["minimum"], schema["maximum"])
        case "string" if "pattern" in schema:
            return {"^[a-z]": "ab", "^[0-9]": "12-34", "^(x|yy": "yyz"}[schema["pattern"][:6]]
        case "string":
            return "é" * rng.randint(schema["minLength"], schema["maxLength"])
        case "array":
            return [instance_of(schema["items"], rng) for _ in range(rng.randint(0, schema["maxItems"]))]
    fields = schema.get("properties", {})
    return {
        name: instance_of(inner, rng)
        for name, inner in fields.items()
        if name in schema["required"] or rng.random() < 0.5
    }


@settings(max_examples=100, deadline=None)
@given(schema=schemas, seed=st.integers(0, 10**6))
def test_every_valid_answer_can_be_given(schema: Any, seed: int) -> None:
    value = instance_of(schema, random.Random(seed))
    jsonschema.validate(value, schema)
    text = json.dumps(value, ensure_ascii=False)
    matcher = GRAMMARS.matcher(Grammar(kind="json_schema", source=json.dumps(schema)))
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    if TOKENIZER.decode(ids) == text:
        assert matcher.validate_tokens(ids) == len(ids), (schema, text)


regexes = st.recursive(
    st.sampled_from(["a", "[b-e]", "[0-9]", " ", "[A-Z]x?", "é"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: "(" + "|".join(parts) + ")"),
        st.builds(lambda part, times: f"({part}){times}", inner, st.sampled_from(["?", "{1,3}", "*", "+"])),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(regex=regexes, seed=st.integers(0, 10**6), sureness=st.floats(0, 1))
def test_every_finished_answer_matches_its_regex(regex: str, seed: int, sureness: float) -> None:
    text = run(Grammar(kind="regex", source=regex), seed, sureness)
    if text is not None:
        assert re.fullmatch(regex, text), text


def test_restricting_twice_is_the_same() -> None:
    grammar = Grammar(kind="regex", source="abc[0-9]+x")
    canvas = canvas_of(32)
    constraint = Constraint(
        GRAMMARS.matcher(grammar), vocab_size=TRAITS.vocab_size, end_ids=TRAITS.eos_token_ids, field="regex"
    )
    decision = Decision(
        start=0,
        tokens=np.full(16, TOKENIZER.encode("a", add_special_tokens=False)[0]),
        transfer=np.ones(16, dtype=np.bool_),
        confidence=np.ones(16),
    )
    first, second = (constraint.restrict(canvas, decision) for _ in range(2))
    assert (first.tokens == second.tokens).all()
    assert (first.transfer == second.transfer).all()
    assert first.transfer.any()


class GivesUp:
    """An automaton that meets a limit when it is asked for the next tokens."""

    def __init__(self) -> None:
        self.has_failed = False

    def is_error(self) -> bool:
        return self.has_failed

    def is_stopped(self) -> bool:
        return self.has_failed

    def get_error(self) -> str:
        return "too many states\n<state>"

    def unsafe_compute_mask_ptr(self, address: int, size: int) -> None:
        self.has_failed = True


def test_an_automaton_that_gives_up_ends_nothing_as_if_it_were_whole() -> None:
    constraint = Constraint(
        GivesUp(), vocab_size=TRAITS.vocab_size, end_ids=TRAITS.eos_token_ids, field="grammar"
    )
    canvas = canvas_of(16)
    assert constraint.follow(canvas) == canvas.prompt_len
    for ask in (constraint.allowed, lambda: constraint.follow(canvas)):
        with pytest.raises(RequestError, match=r"grammar: the grammar is too complex: too many states$"):
            ask()


def test_a_kind_that_does_not_exist_is_named() -> None:
    with pytest.raises(RequestError, match="kind 'xml' does not exist"):
        GRAMMARS.matcher(Grammar(kind="xml"))
