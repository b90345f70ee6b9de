"""Answers that obey a grammar from models without a mask token, whose blocks are decided as a whole."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from sfumato import Engine, EngineConfig, SamplingParams
from sfumato.core.spec import Grammar
from tests.engine.test_structured import SCHEMA, schema_grammar
from tests.models.gemma_folder import write_gemma

ALGORITHMS: dict[str, dict[str, Any]] = {
    "entropy_bound": {"max_denoising_steps": 6},
    "uniform_refinement": {"num_inference_steps": 5},
    "discrete_ddim": {"num_inference_steps": 5, "corrector_steps": 1},
}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Load a tiny DiffusionGemma."""
    folder = write_gemma(tmp_path_factory.mktemp("gemma"))
    return Engine.load(EngineConfig(model=str(folder), device="cpu", dtype="float32", kv_memory=32 << 20))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_gives_valid_json(gemma: Engine, name: str, temperature: float) -> None:
    params = [
        SamplingParams(
            max_tokens=320,
            temperature=temperature,
            seed=seed,
            algorithm=name,
            algorithm_parameters=ALGORITHMS[name],
            grammar=schema_grammar(SCHEMA),
        )
        for seed in range(3)
    ]
    choices = gemma.generate(["Mia, 34, nurse in Oslo"] * 3, params)
    for choice in choices:
        assert choice.finish_reason == "stop", (choice.finish_reason, choice.error, choice.text)
        jsonschema.validate(json.loads(choice.text), SCHEMA)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_neighbours_change_nothing_and_are_not_changed(gemma: Engine, name: str) -> None:
    plain = SamplingParams(
        max_tokens=40, temperature=0.7, seed=5, algorithm=name, algorithm_parameters=ALGORITHMS[name]
    )
    bound = SamplingParams(
        max_tokens=96,
        temperature=0.7,
        seed=6,
        algorithm=name,
        algorithm_parameters=ALGORITHMS[name],
        grammar=schema_grammar(SCHEMA),
    )
    asked = [plain, bound, plain]
    alone = [gemma.generate(["a question"], params)[0].token_ids for params in asked]
    together = gemma.generate(["a question"] * 3, asked)
    assert [choice.token_ids for choice in together] == alone


@pytest.mark.parametrize("name", ["entropy_bound", "discrete_ddim"])
def test_what_is_forced_is_decided_by_the_step_that_ends_its_block(gemma: Engine, name: str) -> None:
    text = "the answer is already known, letter by letter"
    params = SamplingParams(
        max_tokens=80,
        seed=1,
        algorithm=name,
        algorithm_parameters=ALGORITHMS[name],
        grammar=Grammar(kind="choice", source=json.dumps([text])),
    )
    (choice,) = gemma.generate(["a question"], params)
    assert choice.text == text
    num_blocks = -(-(len(text) + 1) // gemma.traits.block_length)
    steps_per_block = 6 if name == "entropy_bound" else 9
    assert choice.usage.denoise_steps == num_blocks * steps_per_block


@pytest.mark.parametrize("name", ALGORITHMS)
def test_pins_inside_a_block_do_not_let_neighbours_in(gemma: Engine, name: str) -> None:
    infill = tuple(100 if place % 3 == 0 else None for place in range(30))
    params = SamplingParams(
        max_tokens=30, seed=4, algorithm=name, algorithm_parameters=ALGORITHMS[name], infill=infill
    )
    other = SamplingParams(max_tokens=40, seed=9, algorithm=name, algorithm_parameters=ALGORITHMS[name])
    (alone,) = gemma.generate(["a question"], params)
    together = gemma.generate(["another one", "a question"], [other, params])
    assert together[1].token_ids == alone.token_ids
