"""Answers that obey a grammar: valid with every algorithm, at every temperature, beside any neighbours."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from sfumato import Engine, EngineConfig, Limits, SamplingParams
from sfumato.core.spec import Grammar
from sfumato.errors import NotSupported, RequestError

MODELS = ("sfumato-tiny-sdar", "sfumato-tiny-llada")
QUESTION = [{"role": "user", "content": "Mia, 34, nurse in Oslo"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "cc"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ALGORITHMS = {
    "sfumato-tiny-sdar": {
        "low_confidence": {},
        "sdar": {},
        "joint_threshold": {},
        "block_refinement": {"editing_threshold": 0.1},
        "fast_dllm": {"threshold": 0.5},
        "llada": {},
        "dinfer": {},
    },
    "sfumato-tiny-llada": {
        "llada": {"steps": 16},
        "fast_dllm": {"cache": "dual"},
        "d3llm": {},
        "dream": {"steps": 16},
        "entropy_threshold": {},
        "dinfer": {},
        "fast_dllm_dream": {},
    },
}


def schema_grammar(schema: Any) -> Grammar:
    """Return the grammar of a schema."""
    return Grammar(kind="json_schema", source=json.dumps(schema))


@pytest.fixture(scope="module", params=MODELS)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Load an embedded model."""
    limits = Limits(max_running_requests=16)
    return Engine.load(
        EngineConfig(model=request.param, device="cpu", dtype="float32", kv_memory=32 << 20, limits=limits)
    )


def model_of(engine: Engine) -> str:
    """Return an engine's model."""
    return MODELS[0] if engine.traits.has_exact_cache else MODELS[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("number", range(7))
def test_every_algorithm_gives_valid_json(engine: Engine, number: int, temperature: float) -> None:
    name, parameters = list(ALGORITHMS[model_of(engine)].items())[number]
    params = SamplingParams(
        max_tokens=128,
        temperature=temperature,
        seed=number,
        algorithm=name,
        algorithm_parameters=parameters,
        grammar=schema_grammar(SCHEMA),
    )
    (choice,) = engine.generate([QUESTION], params)
    assert choice.finish_reason == "stop", (choice.finish_reason, choice.error, choice.text)
    jsonschema.validate(json.loads(choice.text), SCHEMA)
    # At least one token a forward.
    assert choice.usage.denoise_steps <= len(choice.token_ids)


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar(kind="regex", source=r"[A-Z][a-z]{2,5} \d{3}"), r"[A-Z][a-z]{2,5} \d{3}"),
        (Grammar(kind="choice", source='["yes", "no", "may be"]'), "yes|no|may be"),
        (Grammar(kind="lark", source='start: "<" /[a-c]+/ ">" | "none"'), "<[a-c]+>|none"),
        (Grammar(kind="json_object"), r"(?s)\{.*\}"),
    ],
    ids=["regex", "choice", "lark", "json_object"],
)
@pytest.mark.parametrize("temperature", [0.0, 30.0])
def test_every_kind_of_grammar(engine: Engine, grammar: Grammar, pattern: str, temperature: float) -> None:
    params = SamplingParams(max_tokens=160, temperature=temperature, seed=2, grammar=grammar)
    for choice in engine.generate([QUESTION, "What is"], params):
        assert choice.error is None
        if choice.finish_reason == "stop":
            assert re.fullmatch(pattern, choice.text), choice.text
        if grammar.kind == "json_object" and choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.text), dict)
        if grammar.kind == "choice":
            assert choice.finish_reason == "stop"


def test_an_answer_that_is_cut_says_length(engine: Engine) -> None:
    params = SamplingParams(max_tokens=3, grammar=schema_grammar(SCHEMA))
    (choice,) = engine.generate([QUESTION], params)
    assert choice.finish_reason == "length"
    assert len(choice.token_ids) == 3


def test_neighbours_change_nothing_and_are_not_changed(engine: Engine) -> None:
    plain = SamplingParams(max_tokens=40, temperature=0.7, seed=5)
    bound = SamplingParams(max_tokens=96, temperature=0.7, seed=6, grammar=schema_grammar(SCHEMA))
    regex = SamplingParams(
        max_tokens=40, temperature=0.7, seed=7, grammar=Grammar(kind="regex", source="[a-z ]+")
    )
    asked = [plain, bound, regex, plain]
    alone = [engine.generate([QUESTION], params)[0].token_ids for params in asked]
    ids = [engine.add_request(engine.encode(QUESTION), params) for params in asked]
    found: dict[str, list[int]] = {one: [] for one in ids}
    while engine.has_work:
        for output in (output for turn in engine.step() for output in turn.outputs):
            found[output.request_id].extend(output.token_ids)
    assert list(found.values()) == alone


def test_forced_tokens_cost_no_forward(engine: Engine) -> None:
    text = "the answer is already known word by word"
    params = SamplingParams(max_tokens=96, grammar=Grammar(kind="choice", source=json.dumps([text])))
    (choice,) = engine.generate([QUESTION], params)
    assert choice.text == text
    blocks = -(-len(choice.token_ids) // engine.traits.block_length) + 1
    assert choice.usage.denoise_steps <= blocks


def test_what_is_refused(engine: Engine) -> None:
    cases: list[tuple[Grammar, dict[str, Any], str]] = [
        (Grammar(kind="regex", source="a(b"), {}, "regex: .*invalid regex"),
        (Grammar(kind="lark", source='start: "a" foo'), {}, 'unknown name: "foo"'),
        (
            schema_grammar({"type": "array", "uniqueItems": True}),
            {},
            "keyword 'uniqueItems' is not supported",
        ),
        (schema_grammar(SCHEMA), {"ignore_eos": True}, "ignore_eos"),
    ]
    for grammar, options, message in cases:
        with pytest.raises(RequestError, match=message):
            engine.generate([QUESTION], SamplingParams(max_tokens=8, grammar=grammar, **options))
    if engine.traits.has_exact_cache:
        params = SamplingParams(
            max_tokens=8, algorithm="joint_threshold_indel", grammar=schema_grammar(SCHEMA)
        )
        with pytest.raises(NotSupported, match="joint_threshold_indel"):
            engine.generate([QUESTION], params)


def test_infill_pins_are_read_by_the_automaton() -> None:
    engine = Engine.load(EngineConfig(model=MODELS[1], device="cpu", dtype="float32", kv_memory=32 << 20))
    ids = engine.encode("abc")
    infill = (ids[0], None, None, *engine.encode("x"), None)
    grammar = Grammar(kind="regex", source="(?s).*")
    (choice,) = engine.generate(
        [QUESTION], SamplingParams(max_tokens=len(infill), infill=infill, grammar=grammar)
    )
    assert choice.token_ids[0] == ids[0]
    wrong = Grammar(kind="regex", source="[0-9]+")
    with pytest.raises(RequestError, match="pinned text at position 0"):
        engine.generate([QUESTION], SamplingParams(max_tokens=len(infill), infill=infill, grammar=wrong))
