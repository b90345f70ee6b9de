"""Gaps: /v1/infill and `suffix`; what is given stays, what cannot be filled is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serve.running import BARE, LLADA, SDAR, Server

SUM = [{"role": "user", "content": "Tom has 12 apples and buys 7 more. He gives away 4. How many are left?"}]
PARTS: list[Any] = ["12+7=", {"length": 2}, ". 19-4=", {"length": [1, 3]}, ". The answer is 15."]


def fill(server: Server, **fields: Any) -> Any:
    return server.http.post("/v1/infill", json={"model": LLADA, **fields})


def test_gaps_are_filled_and_the_rest_stays(server: Server) -> None:
    answer = fill(server, messages=SUM, parts=PARTS).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "12+7=19. 19-4=15. The answer is 15."
    assert [gap["text"] for gap in choice["gaps"]] == ["19", "15"]
    assert [gap["length"] for gap in choice["gaps"]] == [2, 2]
    assert answer["object"] == "infill"


def test_the_most_likely_lengths_are_taken(server: Server) -> None:
    answer = fill(server, messages=SUM, parts=PARTS).json()
    tried = answer["candidates"]
    assert [each["lengths"] for each in tried] == [[2, 1], [2, 2], [2, 3]]
    (chosen,) = [each for each in tried if each["is_chosen"]]
    assert chosen["mean_logprob"] == max(each["mean_logprob"] for each in tried)
    assert answer["choices"][0]["mean_logprob"] == chosen["mean_logprob"] <= 0


def test_what_is_given_counts_as_given(server: Server) -> None:
    one = fill(server, parts=["12+7=", {"length": 2}, "."]).json()["usage"]
    pins = sum(
        server.http.post("/tokenize", json={"model": LLADA, "prompt": t}).json()["count"]
        for t in ("12+7=", ".")
    )
    assert one["completion_tokens"] == 2
    assert one["prompt_tokens"] == pins
    assert one["tokens_per_forward"] == round(2 / one["nfe"], 4)
    many = fill(server, parts=["12+7=", {"length": [1, 3]}, "."]).json()["usage"]
    assert many["completion_tokens"] == 1 + 2 + 3
    assert many["prompt_tokens"] == pins


def test_a_seed_and_n_choose_among_the_same_lengths(server: Server) -> None:
    body = {"parts": ["12+7=", {"length": [1, 2]}, "."], "n": 2, "seed": 5, "temperature": 1.0}
    first, again = fill(server, **body).json(), fill(server, **body).json()
    assert [each["index"] for each in first["choices"]] == [0, 1]
    assert first["choices"] == again["choices"]
    for index in (0, 1):
        mine = [each for each in first["candidates"] if each["choice"] == index]
        assert sum(each["is_chosen"] for each in mine) == 1
        assert len(mine) == 2


def test_a_stream_shows_every_candidate_denoise(server: Server) -> None:
    body = {"parts": PARTS, "messages": SUM, "stream": True, "stream_options": {"include_canvas": True}}
    lines = fill(server, **body).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    layouts = chunks[0]["candidates"]
    assert [each["lengths"] for each in layouts] == [[2, 1], [2, 2], [2, 3]]
    for chunk in chunks[1:-1]:
        (candidate,) = chunk["candidates"]
        layout, canvas = layouts[candidate["index"]]["tokens"], candidate["canvas"]
        for offset, token in enumerate(canvas["tokens"]):
            given = layout[canvas["start"] + offset]
            assert given is None or (given == token and not canvas["undecided"][offset])
    assert chunks[-1]["choices"][0]["text"] == "12+7=19. 19-4=15. The answer is 15."
    assert chunks[-1]["usage"]["nfe"] > 0


def test_token_ids_are_parts_too(server: Server) -> None:
    ids = server.http.post("/tokenize", json={"model": LLADA, "prompt": "12+7="}).json()["tokens"]
    by_ids = fill(server, parts=[ids, {"length": 2}, "."], seed=1).json()
    by_text = fill(server, parts=["12+7=", {"length": 2}, "."], seed=1).json()
    assert by_ids["choices"][0]["token_ids"] == by_text["choices"][0]["token_ids"]
    assert by_ids["choices"][0]["text"] == by_text["choices"][0]["text"]


def test_a_gap_never_holds_an_end(server: Server) -> None:
    answer = fill(server, messages=SUM, parts=["12+7=19. 19-4=15. The answer is 15.", {"length": 12}]).json()
    eos = server.http.get(f"/v1/models/{LLADA}").json()["eos_token_ids"]
    assert not set(answer["choices"][0]["gaps"][0]["token_ids"]) & set(eos)


def test_suffix_makes_one_gap_of_max_tokens(server: Server) -> None:
    body = {"model": LLADA, "prompt": "12+7=", "suffix": ". The answer is 19.", "max_tokens": 2}
    answer = server.http.post("/v1/completions", json={**body, "logprobs": 1}).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "19"
    assert len(choice["logprobs"]["tokens"]) == 2
    assert answer["usage"]["completion_tokens"] == 2
    echoed = server.http.post("/v1/completions", json={**body, "echo": True}).json()
    assert echoed["choices"][0]["text"] == "12+7=19"
    lines = server.http.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "19"
    plain = server.http.post("/v1/completions", json={**body, "suffix": ""}).json()
    assert plain["usage"]["prompt_tokens"] < answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("model", [SDAR, BARE])
def test_models_that_see_only_what_comes_before_are_refused(server: Server, model: str) -> None:
    for path, field, asked in (
        ("/v1/infill", "model", {"parts": [[5, 6], {"length": 2}]}),
        ("/v1/completions", "suffix", {"prompt": [5, 6], "suffix": "x"}),
    ):
        answer = server.http.post(path, json={"model": model, **asked})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == field
        assert "block_causal" in error["message"]
    report = server.http.get(f"/v1/models/{model}").json()["infill"]
    assert not report["is_supported"]
    assert "block_causal" in report["reason"]
    assert server.http.get(f"/v1/models/{LLADA}").json()["infill"] == {"is_supported": True, "reason": None}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"parts": ["no gap"]}, "parts"),
        ({"parts": []}, "parts"),
        ({"parts": [{"length": 0}]}, "parts"),
        ({"parts": [{"length": [4, 2]}]}, "parts"),
        ({"parts": [{"length": [1, 65]}]}, "parts"),
        ({"parts": [{"length": [1, 8]}, "x", {"length": [1, 9]}]}, "parts"),
        ({"parts": [{"length": True}]}, "parts"),
        ({"parts": [{"length": 2, "text": "x"}]}, "parts"),
        ({"parts": ["\ud800", {"length": 2}]}, "parts"),
        ({"parts": [[10**6], {"length": 2}]}, "parts"),
        ({"parts": [{"length": 100_000}]}, "parts"),
        ({"parts": [{"length": 2}], "max_tokens": 5}, "max_tokens"),
        ({"parts": [{"length": 2}], "stop": "x"}, "stop"),
        ({"parts": [{"length": 2}], "ignore_eos": True}, "ignore_eos"),
        ({"parts": [{"length": 2}], "prompt": "x", "messages": SUM}, "messages"),
        ({"parts": [{"length": 2}], "echo": True}, "echo"),
        ({"parts": [{"length": [1, 64]}], "n": 128}, "n"),
        ({"parts": [{"length": 2}], "stream_options": {"include_canvas": True}}, "stream_options"),
        ({}, "parts"),
    ],
)
def test_what_cannot_be_filled_is_refused_by_name(server: Server, fields: Any, param: str) -> None:
    answer = server.http.post(
        "/v1/infill",
        content=json.dumps({"model": LLADA, **fields}),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_a_prompt_is_scored_without_a_suffix_only(server: Server) -> None:
    body = {"model": LLADA, "prompt": "12+7=", "suffix": ".", "echo": True, "logprobs": 0}
    assert server.http.post("/v1/completions", json=body).json()["error"]["param"] == "suffix"


def test_a_gap_beyond_the_context_is_refused(server: Server) -> None:
    body = {"model": LLADA, "prompt": "12+7=", "suffix": ".", "max_tokens": 507}
    error = server.http.post("/v1/completions", json=body).json()["error"]
    assert error["param"] == "max_tokens"
    assert "513 tokens" in error["message"]
    at_once = {**body, "max_tokens": 500, "algorithm_parameters": {"threshold": 0.0}}
    assert server.http.post("/v1/completions", json=at_once).status_code == 200
