"""What /v1/models says of choices: the doors accept both ends of each range, and nothing beyond."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.running import LLADA, SD3, SD15, SDAR, Server


def controls(server: Server, model: str) -> dict[str, Any]:
    return {each["name"]: each for each in server.http.get(f"/v1/models/{model}").json()["controls"]}


def beyond(control: dict[str, Any]) -> list[Any]:
    step = control.get("unit", 1)
    return [control["minimum"] - step, control["maximum"] + step]


@pytest.mark.parametrize("model", [SDAR, LLADA])
def test_ranges_of_text_are_those_of_the_door(server: Server, model: str) -> None:
    found = controls(server, model)
    names = ["max_tokens", "block_length", "temperature", "top_p", "top_k", "ignore_eos", "seed"]
    assert list(found) == names

    def refusal(name: str, value: Any) -> str | None:
        body = {"model": model, "prompt": "12+7=", "max_tokens": 1, name: value}
        answer = server.http.post("/v1/completions", json=body)
        return None if answer.status_code == 200 else answer.json()["error"]["param"]

    for name in ("block_length", "temperature", "top_k", "seed"):
        control = found[name]
        assert refusal(name, control["minimum"]) is None
        # Where blocks are counted from the prompt's end, the longest one leaves no room for a prompt.
        assert refusal(name, control["maximum"]) in (None, "prompt" if name == "block_length" else None)
        # -1 is another word for all tokens.
        below, above = beyond(control)
        assert name == "top_k" or refusal(name, below) == name
        assert refusal(name, above) == name
    assert refusal("top_p", 1.0) is None
    assert [refusal("top_p", value) for value in (0.0, 1.5)] == ["top_p", "top_p"]
    for name in ("block_length", "temperature", "top_k", "max_tokens", "ignore_eos"):
        assert refusal(name, found[name]["default"]) is None


@pytest.mark.parametrize("model", [SD15, SD3])
def test_ranges_of_pictures_are_those_of_the_door(drawing: Server, model: str) -> None:
    found = controls(drawing, model)
    fields = drawing.http.get(f"/v1/models/{model}").json()["fields"]
    own = {
        "guidance_scale",
        "negative_prompt",
        "guidance_rescale",
        "true_cfg_scale",
        "eta",
        "max_sequence_length",
    }
    assert set(found) == {"size", "num_inference_steps", "scheduler", "seed"} | (own & set(fields))

    def refusal(name: str, value: Any) -> str | None:
        # PNDM plans with the steps before.
        steps = 4 if name == "scheduler" else 1
        body = {"model": model, "prompt": "x", "num_inference_steps": steps, name: value}
        answer = drawing.http.post("/v1/images/generations", json=body)
        return None if answer.status_code == 200 else answer.json()["error"]["param"]

    for name, control in found.items():
        if control["type"] in ("int", "float") and name != "num_inference_steps":
            ends = [end for end in (control["minimum"], control["maximum"]) if abs(end) < 2**53]
            # Only some timestep schedulers know eta, and others refuse another than 0.
            assert name == "eta" or [refusal(name, end) for end in ends] == [None] * len(ends)
            assert [refusal(name, value) for value in beyond(control)] == [name, name]
    for choice in found["scheduler"]["choices"]:
        assert refusal("scheduler", choice) is None
    assert refusal("size", found["size"]["default"]) is None
    assert refusal("num_inference_steps", 0) == refusal("num_inference_steps", 1001) == "num_inference_steps"


def test_algorithms_that_cannot_run_are_not_offered(server: Server) -> None:
    names = {each["name"] for each in server.http.get(f"/v1/models/{SDAR}").json()["algorithms"]}
    assert "low_confidence" in names
    # They begin with random tokens, where this model has a mask token.
    assert not names & {"entropy_bound", "discrete_ddim", "uniform_refinement"}
