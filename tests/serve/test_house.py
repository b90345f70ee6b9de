"""Everything around the two text APIs: keys, models, tokens, health, metrics, errors of routes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import APIStatusError, APITimeoutError, AuthenticationError, NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.running import BARE, LLADA, SDAR, SLOW, Server

MESSAGES: list[Any] = [{"role": "user", "content": "Mia, 34, nurse in Oslo"}]


def test_a_wrong_key_opens_nothing(server: Server) -> None:
    with server.client("wrong") as openai, pytest.raises(AuthenticationError) as refused:
        openai.models.list()
    assert refused.value.code == "invalid_api_key"
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        assert httpx.post(f"{server.url}{path}", json={}).status_code == 401
    assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Basic x"}).status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_models_say_what_may_be_chosen(client: OpenAI) -> None:
    listed: list[Any] = client.models.list().data
    assert [model.id for model in listed] == [SDAR, LLADA, BARE]
    sdar = listed[0]
    assert (sdar.object, sdar.owned_by, sdar.architecture) == ("model", "sfumato", "SDARForCausalLM")
    assert sdar.context_length == sdar.max_model_len == 512
    assert sdar.block_length == 16
    assert sdar.default_algorithm in [algorithm["name"] for algorithm in sdar.algorithms]
    low = next(algorithm for algorithm in sdar.algorithms if algorithm["name"] == "low_confidence")
    threshold = next(each for each in low["parameters"] if each["name"] == "threshold")
    assert threshold["minimum"] == 0.0
    assert threshold["doc"]
    assert [model.has_tokenizer for model in listed] == [True, True, False]
    assert client.models.retrieve(LLADA).id == LLADA


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as missing:
        client.models.retrieve("gpt-4")
    assert missing.value.code == "model_not_found"
    with pytest.raises(NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="hi")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


def test_unknown_routes_and_methods_have_openais_form(server: Server) -> None:
    for answer, status in (
        (server.http.post("/v1/embeddings", json={}), 404),
        (server.http.get("/v1/completions"), 405),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_text_becomes_tokens_and_text_again(server: Server) -> None:
    text = "Mia, 34, Köln: naïve 日本 <|mask|>\n"
    told = server.http.post(
        "/tokenize", json={"model": LLADA, "prompt": text, "return_token_strs": True}
    ).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 512
    back = server.http.post("/detokenize", json={"model": LLADA, "tokens": told["tokens"]}).json()
    assert back == {"prompt": text}
    chat = server.http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert chat["count"] > 0
    for path, body in (
        ("/tokenize", {"model": SDAR}),
        ("/tokenize", {"model": SDAR, "prompt": "x", "messages": MESSAGES}),
        ("/tokenize", {"model": BARE, "prompt": "x"}),
        ("/detokenize", {"model": SDAR, "tokens": [100000]}),
        ("/detokenize", {"model": SDAR}),
        ("/detokenize", {"model": SDAR, "tokens": ["x"]}),
    ):
        assert server.http.post(path, json=body).status_code == 400


def test_health_asks_the_engines(server: Server) -> None:
    answer = server.http.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "models": [SDAR, LLADA, BARE]}


def test_metrics_count_what_happened(server: Server, client: OpenAI) -> None:
    before = _metrics(server)
    usage: Any = client.chat.completions.create(model=SDAR, messages=MESSAGES, max_tokens=8).usage
    after = _metrics(server)

    def gained(name: str, **labels: str) -> float:
        key = (name, frozenset({"model": SDAR, **labels}.items()))
        return after.get(key, 0.0) - before.get(key, 0.0)

    ends = sum(
        gained("sfumato_requests_total", endpoint="/v1/chat/completions", end=end)
        for end in ("stop", "length")
    )
    assert ends == 1
    assert gained("sfumato_completion_tokens_total") == usage.completion_tokens
    assert gained("sfumato_prompt_tokens_total") == usage.prompt_tokens
    assert gained("sfumato_nfe_total") == usage.nfe
    assert gained("sfumato_steps_total", kind="denoise") == usage.denoise_steps
    assert gained("sfumato_rows_total", kind="denoise") >= usage.denoise_steps
    for name in ("queue_seconds", "time_to_first_text_seconds", "tokens_per_forward", "request_nfe"):
        assert gained(f"sfumato_{name}_count") == 1
    for part in ("host", "device"):
        assert gained("sfumato_step_seconds_sum", kind="denoise", part=part) > 0
    pages = [
        after["sfumato_kv_pages", frozenset({"model": SDAR, "state": state}.items())]
        for state in ("free", "leased", "cached")
    ]
    assert sum(pages) > 0
    assert after["sfumato_engine_up", frozenset({("model", SDAR)})] == 1


def _metrics(server: Server) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    return {
        (each.name, frozenset(each.labels.items())): each.value
        for family in families
        for each in family.samples
    }


def test_a_deadline_is_an_error_and_not_a_short_answer(client: OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": SDAR,
        "messages": MESSAGES,
        "max_tokens": 400,
        "extra_body": {**SLOW, "timeout": 0.1},
    }
    with pytest.raises(APIStatusError) as late:
        client.chat.completions.create(**fields)
    assert late.value.status_code == 408
    assert late.value.code == "timeout"
    assert not isinstance(late.value, APITimeoutError)
    # The official client takes an error in a stream for one of its own kind.
    with (
        client.chat.completions.create(**fields, stream=True) as stream,
        pytest.raises(Exception, match="timeout"),
    ):
        list(stream)
