"""Scores over HTTP: prompts echoed with log probabilities, and the endpoint of likelihoods."""

from __future__ import annotations

import pytest
from openai import BadRequestError, OpenAI

from tests.serve.running import BARE, LLADA, SDAR, Server

PROMPT = "one two three four"


def score(server: Server, **fields: object) -> dict[str, object]:
    answer = server.http.post("/v1/log_likelihood", json=fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_an_echoed_prompt_has_log_probabilities(client: OpenAI, max_tokens: int) -> None:
    answer = client.completions.create(
        model=SDAR, prompt=[PROMPT, "five"], max_tokens=max_tokens, echo=True, logprobs=2, seed=1
    )
    for choice, prompt in zip(answer.choices, [PROMPT, "five"], strict=True):
        logprobs = choice.logprobs
        assert choice.text.startswith(prompt)
        assert logprobs is not None
        assert logprobs.token_logprobs[0] is None
        assert logprobs.top_logprobs[0] is None
        assert all(value <= 0 for value in logprobs.token_logprobs[1:])
        assert "".join(logprobs.tokens).startswith(prompt)
        assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs[1:])
        assert logprobs.text_offset == sorted(logprobs.text_offset)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 2 * max_tokens


def test_the_echo_agrees_with_the_endpoint(client: OpenAI, server: Server) -> None:
    tokens = server.http.post("/tokenize", json={"model": SDAR, "prompt": PROMPT}).json()["tokens"]
    answer = client.completions.create(model=SDAR, prompt=tokens, max_tokens=0, echo=True, logprobs=0)
    echoed = answer.choices[0].logprobs.token_logprobs[2:]  # type: ignore[union-attr]
    exact = score(server, model=SDAR, prompt=tokens[:2], completion=tokens[2:])
    assert exact["method"] == "exact"
    assert exact["token_logprobs"] == pytest.approx(echoed, abs=1e-5)
    assert exact["log_likelihood"] == pytest.approx(sum(echoed), abs=1e-4)
    assert exact["standard_error"] is None


def test_a_bidirectional_model_is_estimated_and_says_so(client: OpenAI, server: Server) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model=LLADA, prompt=PROMPT, max_tokens=1, echo=True, logprobs=1)
    assert refused.value.param == "echo"
    assert "log_likelihood" in str(refused.value)
    fields = {"model": LLADA, "prompt": PROMPT, "completion": " five", "num_samples": 8, "seed": 3}
    first, second = score(server, **fields), score(server, **fields)
    assert first["method"] == "monte_carlo"
    assert first["log_likelihood"] == second["log_likelihood"]
    assert first["num_samples"] == 8
    metrics = server.http.get("/metrics").text
    counted = [line for line in metrics.splitlines() if "requests_total{" in line and 'end="scored"' in line]
    assert any(LLADA in line and "log_likelihood" in line for line in counted), metrics
    assert first["seed"] == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"completion": ""}, "completion"),
        ({"completion": [1, 10**6]}, "completion"),
        ({"completion": "a", "num_samples": 4}, "num_samples"),
        ({"completion": "a", "temperature": 1}, "temperature"),
        ({"completion": "a", "cfg_scale": 1.0}, "cfg_scale"),
        ({"completion": {"text": "a"}}, "completion"),
    ],
)
def test_refusals_name_the_field(server: Server, fields: dict[str, object], param: str) -> None:
    answer = server.http.post("/v1/log_likelihood", json={"model": SDAR, "prompt": PROMPT, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_model_without_a_tokenizer_takes_ids(server: Server) -> None:
    found = score(server, model=BARE, prompt=[5, 6], completion=[7, 8, 9])
    assert len(found["token_logprobs"]) == 3  # type: ignore[arg-type]


def test_max_tokens_0_only_scores(server: Server) -> None:
    body = {"model": SDAR, "prompt": PROMPT, "max_tokens": 0}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "max_tokens"
    answer = server.http.post(
        "/v1/completions", json=body | {"echo": True, "logprobs": 1, "stream": True, "max_tokens": 1}
    )
    assert answer.json()["error"]["param"] == "stream"
