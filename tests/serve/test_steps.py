"""The stream of steps: who had rows in them, only while somebody watches, and only with a key."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx

from tests.serve.running import LLADA, SDAR, SLOW, Server


def events(answer: httpx.Response) -> Iterator[Any]:
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_steps_name_the_requests_that_they_ran(server: Server) -> None:
    body = {"model": SDAR, "prompt": "12+7=", "max_tokens": 48, **SLOW}
    ids: list[str] = []

    def ask() -> None:
        ids.append(server.http.post("/v1/completions", json=body).json()["id"])

    with server.http.stream("GET", "/v1/engine/steps", params={"model": SDAR}) as answer:
        coming = events(answer)
        first = next(coming)
        assert (first["model"], first["steps"], first["is_gone"]) == (SDAR, [], False)
        asking = [threading.Thread(target=ask) for _ in range(2)]
        for thread in asking:
            thread.start()
        seen: list[Any] = []
        for event in coming:
            seen += event["steps"]
            if seen and not event["steps"] and event["gauges"]["running"] == 0:
                break
        for thread in asking:
            thread.join()
    shares = [share for step in seen for share in step["shares"]]
    assert {share["request_id"] for share in shares} == {f"{request_id}-0" for request_id in ids}
    assert {"denoise", "commit"} <= {share["kind"] for share in shares}
    assert any(len({share["request_id"] for share in step["shares"]}) == 2 for step in seen)
    for step in seen:
        assert sum(share["rows"] for share in step["shares"]) == step["rows"]
        assert sum(share["tokens"] for share in step["shares"]) == step["tokens"]
        assert step["device_seconds"] > 0
    launches = [step["launch_id"] for step in seen]
    assert launches == sorted(launches)


def test_all_models_are_watched_at_once(server: Server) -> None:
    with server.http.stream("GET", "/v1/engine/steps") as answer:
        coming = events(answer)
        assert {next(coming)["model"] for _ in range(3)} >= {SDAR, LLADA}


def test_watching_needs_a_key_and_a_model_that_exists(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/engine/steps").status_code == 401
    assert server.http.get("/v1/engine/steps", params={"model": "gpt-4"}).status_code == 404
