"""d3LLM as it is served, which is the published server patch: same tokens and forwards as its Dream goldens.

The golden README's section 9 names the patch's differences from the loop; without an early stop none of them
shows in the results.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfumato import Engine, SamplingParams

DREAM = Path(__file__).resolve().parent.parent / "data" / "goldens" / "dream"
PARAMETERS = ("threshold", "block_add_threshold", "decoded_token_threshold")
ALL = sorted((DREAM / "cases").glob("d3_mb_*.json"))
CASES = [path for path in ALL if not json.loads(path.read_text())["params"].get("early_stop")]
STOPPED = [path for path in ALL if path not in CASES]


def test_there_are_cases() -> None:
    assert len(CASES) >= 5
    assert len(STOPPED) >= 3


@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_the_served_form_equals_the_reference(path: Path) -> None:
    case = json.loads(path.read_text())
    params = case["params"]
    engine = Engine.load(str(DREAM / "checkpoints" / case["checkpoint"]), dtype="float32")
    asked = SamplingParams(
        max_tokens=params["max_new_tokens"],
        block_length=params["block_size"],
        ignore_eos=True,
        algorithm="d3llm",
        algorithm_parameters={name: params[name] for name in PARAMETERS},
    )
    (choice,) = engine.generate([case["input_ids"][0]], asked)
    assert choice.token_ids == case["generated_ids"][0]
    assert choice.usage.denoise_steps == case["nfe"]


@pytest.mark.parametrize("path", STOPPED, ids=[path.stem for path in STOPPED])
def test_an_early_stop_changes_nothing_in_front_of_the_end_token(path: Path) -> None:
    case = json.loads(path.read_text())
    params = case["params"]
    engine = Engine.load(str(DREAM / "checkpoints" / case["checkpoint"]), dtype="float32")
    asked = SamplingParams(
        max_tokens=params["max_new_tokens"],
        block_length=params["block_size"],
        algorithm="d3llm",
        algorithm_parameters={name: params[name] for name in PARAMETERS},
    )
    (choice,) = engine.generate([case["input_ids"][0]], asked)
    (wanted,) = case["generated_until_eos"]
    end = [case["eos_token_id"]] if case["eos_token_id"] in case["generated_ids"][0] else []
    assert choice.token_ids == [*wanted, *end]
    assert choice.usage.denoise_steps <= case["nfe"]
