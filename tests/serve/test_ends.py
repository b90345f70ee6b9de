"""How a server ends: drained, hurried, or with an engine that was killed; no process is left in any case."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, InternalServerError, OpenAI

from tests.serve.running import KEY, LLADA, SDAR, SLOW, Server, serving

HEADERS = {"Authorization": f"Bearer {KEY}"}


def slow_stream(openai: OpenAI, model: str, **fields: Any) -> Any:
    return openai.completions.create(
        model=model, prompt=[5, 6, 7], stream=True, extra_body=SLOW, **{"max_tokens": 400, **fields}
    )


CONFIG = """
models:
  sfumato-tiny-sdar:
    algorithm: low_confidence
    algorithm-parameters: {threshold: 0.5}
    kv-memory: 8M
"""


def test_a_signal_drains(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(CONFIG)
    arguments = ("--config", str(tmp_path / "models.yaml"), "--served-model-name", "little")
    with serving(tmp_path, *arguments) as server, server.client() as openai:
        assert len(server.engines) == 1
        served: Any = openai.models.retrieve("little")
        assert served.default_algorithm == "low_confidence"
        assert served.default_algorithm_parameters == {"threshold": 0.5}
        with slow_stream(openai, "little", max_tokens=150) as stream:
            chunks = iter(stream)
            next(chunks)
            server.signal(signal.SIGTERM)
            refused = wait_for_refusal(server, "little")
            assert refused.json()["error"]["code"] == "engine_unavailable"
            assert server.http.get("/health").status_code == 503
            rest = list(chunks)
        assert rest[-1].choices[0].finish_reason == "length"
        assert server.wait() == 0
        assert server.left_behind() == []
    assert "Traceback" not in (tmp_path / "stderr.txt").read_text()


def wait_for_refusal(server: Server, model: str) -> httpx.Response:
    """Ask until the server drains."""
    while True:
        answer = server.http.post("/v1/completions", json={"model": model, "prompt": [5], "max_tokens": 1})
        if answer.status_code == 503:
            return answer
        assert answer.status_code == 200


def test_a_killed_engine_and_a_second_signal(tmp_path: Path) -> None:
    with serving(tmp_path, SDAR, LLADA) as server, server.client() as openai:
        one_engine_dies(server, openai)
        two_signals_end_everything(server, openai)
    assert "Traceback" not in (tmp_path / "stderr.txt").read_text()


def one_engine_dies(server: Server, openai: OpenAI) -> None:
    """Kill the engine of one model in the middle of a stream; the other model goes on."""
    with slow_stream(openai, SDAR) as stream:
        chunks = iter(stream)
        next(chunks)
        os.kill(server.engines[0], signal.SIGKILL)
        with pytest.raises(APIError, match="gone"):
            list(chunks)
    with pytest.raises(InternalServerError) as refused:
        openai.completions.create(model=SDAR, prompt=[5], max_tokens=1)
    assert refused.value.status_code == 503
    health = server.http.get("/health")
    assert health.status_code == 503
    assert SDAR in health.json()["error"]["message"]
    assert LLADA not in health.json()["error"]["message"]
    assert openai.completions.create(model=LLADA, prompt=[5], max_tokens=1).choices
    assert server.gauge("sfumato_engine_up", SDAR) == 0
    assert server.gauge("sfumato_engine_up", LLADA) == 1


def two_signals_end_everything(server: Server, openai: OpenAI) -> None:
    """A stream and a plain request get their terminal messages; the server ends at once."""
    answers: list[httpx.Response] = []
    body = {"model": LLADA, "prompt": [5, 6, 7], "max_tokens": 400, **SLOW}
    asking = threading.Thread(
        target=lambda: answers.append(
            httpx.post(f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=30)
        )
    )
    with slow_stream(openai, LLADA) as stream:
        chunks = iter(stream)
        next(chunks)
        asking.start()
        assert server.wait_for("sfumato_running_requests", LLADA, 2)
        server.signal()
        # Two signals that come before the first is noticed are one.
        wait_for_refusal(server, LLADA)
        server.signal()
        with pytest.raises(APIError, match="shutting down"):
            list(chunks)
    asking.join(20)
    assert answers[0].status_code == 503
    assert server.wait() == 0
    assert server.left_behind() == []


def test_a_server_that_cannot_start_says_why_in_one_line(tmp_path: Path, server: Server) -> None:
    port = server.url.rsplit(":", 1)[1]
    for arguments, reason in (
        ((SDAR, "--port", port), "in use"),
        (("no-such-model",), "no-such-model"),
        ((SDAR, "--kv-memory", "1K"), "kv-memory"),
    ):
        with pytest.raises(AssertionError, match=reason), serving(tmp_path, *arguments):
            pass
        lines = (tmp_path / "stderr.txt").read_text().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("sfumato: error: ")
