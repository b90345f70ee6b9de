"""The same answers in every mode, through the front door; and what a replica that dies takes with it."""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, InternalServerError

from tests.serve.running import SDAR, SLOW, Server, is_running, serving

MODES = {
    "overlap": ("--overlap", "on"),
    "ahead": ("--overlap", "device"),
    "graphs and ahead": ("--graphs", "on", "--overlap", "device"),
    "replicas": ("--data-parallel", "2"),
    "shared weights": ("--data-parallel", "2", "--data-parallel-attention"),
    "shared weights and overlap": ("--data-parallel", "2", "--data-parallel-attention", "--overlap", "on"),
    "two ranks": ("--tensor-parallel", "2"),
    "prefill apart": ("--disaggregate", "1:1"),
    "prefill apart, shared weights": ("--disaggregate", "1:2", "--data-parallel-attention"),
    "prefill apart and overlap": ("--disaggregate", "1:1", "--overlap", "on"),
    "prefill apart and ahead": ("--disaggregate", "1:1", "--overlap", "device"),
    "replicas and overlap": ("--data-parallel", "2", "--overlap", "on"),
}
QUESTIONS = (
    "Tom has 12 apples and buys 7 more. How many has he?",
    "Sort the words: pear apple fig",
    "12+7=",
    "Mia, 34, nurse in Oslo",
)
ALGORITHMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sdar", {}),
    ("sdar", {"remasking_strategy": "sequential"}),
    ("low_confidence", {"threshold": 0.8}),
    ("fast_dllm", {"factor": 1.0}),
    ("joint_threshold", {"max_post_edit_steps": 4}),
    ("dinfer", {}),
)


def mixed(seed: int, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Return paths and bodies of unlike requests."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        name, parameters = rng.choice(ALGORITHMS)
        body: dict[str, Any] = {
            "model": SDAR,
            "max_tokens": rng.choice([3, 16, 40]),
            "temperature": rng.choice([0.0, 0.0, 0.8]),
            "seed": rng.randrange(50),
            "algorithm": name,
            "algorithm_parameters": parameters,
            "block_length": rng.choice([16, 32]),
            "return_token_ids": True,
        }
        if rng.random() < 0.5:
            messages = [{"role": "user", "content": rng.choice(QUESTIONS)}]
            found.append(("/v1/chat/completions", body | {"messages": messages}))
        else:
            prompt = [rng.randrange(5, 200) for _ in range(rng.choice([1, 20, 70]))]
            found.append(("/v1/completions", body | {"prompt": prompt, "n": rng.choice([1, 1, 2])}))
    return found


def answers(server: Server, asked: list[tuple[str, dict[str, Any]]]) -> list[list[Any]]:
    """Send all requests, sixteen at a time, and return the tokens and ends of their choices."""

    def one(request: tuple[str, dict[str, Any]]) -> list[Any]:
        path, body = request
        answer = server.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return [(choice["token_ids"], choice["finish_reason"]) for choice in answer.json()["choices"]]

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, asked))


@pytest.mark.parametrize("mode", [mode for mode in MODES if "and" not in mode])
def test_answers_are_those_of_the_plain_mode(server: Server, tmp_path: Path, mode: str) -> None:
    asked = mixed(1, 40)
    with serving(tmp_path, SDAR, "--dtype", "float32", *MODES[mode]) as other:
        assert answers(other, asked) == answers(server, asked)
        other.signal()
        assert other.wait() == 0
        assert other.left_behind() == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_200_answers_are_those_of_the_plain_mode(server: Server, tmp_path: Path, mode: str) -> None:
    asked = mixed(2, 200)
    with serving(tmp_path, SDAR, "--dtype", "float32", *MODES[mode]) as other:
        assert answers(other, asked) == answers(server, asked)


def test_a_replica_that_dies_leaves_its_requests_to_the_other(tmp_path: Path) -> None:
    # One place per replica, so that what is behind the first requests has not begun.
    arguments = (SDAR, "--dtype", "float32", "--data-parallel", "2", "--max-running-requests", "1")
    with serving(tmp_path, *arguments) as server, server.client() as openai:
        assert len(server.engines) == 2
        assert openai.models.retrieve(SDAR).model_extra["num_replicas"] == 2  # type: ignore[index]
        assert server.http.get("/health").json()["status"] == "ok"
        streams = [
            openai.completions.create(
                model=SDAR, prompt=[5, 6, n], max_tokens=300, stream=True, extra_body=SLOW
            )
            for n in range(2)
        ]
        begun = [iter(stream) for stream in streams]
        texts = [next(stream).choices[0].text for stream in begun]
        bodies = [{"model": SDAR, "prompt": [7, 8, n], "max_tokens": 20, **SLOW} for n in range(4)]
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(server.http.post, "/v1/completions", json=body) for body in bodies]
            assert server.wait_for("sfumato_waiting_requests", SDAR, 4.0)
            os.kill(server.engines[0], signal.SIGKILL)
            # The other engine answers all of them: what had begun goes on behind what was streamed.
            for n, stream in enumerate(begun):
                texts[n] += "".join(chunk.choices[0].text for chunk in stream)
            assert [call.result().status_code for call in waiting] == [200] * 4
        for n, text in enumerate(texts):
            again = openai.completions.create(model=SDAR, prompt=[5, 6, n], max_tokens=300, extra_body=SLOW)
            assert again.choices[0].text == text
        assert server.gauge("sfumato_requests_retried", SDAR) >= 1
        health = server.http.get("/health")
        assert health.status_code == 200
        assert health.json()["status"] == "degraded"
        after = openai.completions.create(model=SDAR, prompt=[5, 6, 7], max_tokens=4)
        assert after.choices[0].finish_reason
        os.kill(server.engines[1], signal.SIGKILL)
        while is_running(server.engines[1]):
            time.sleep(0.01)
        with pytest.raises((InternalServerError, APIError)):
            openai.completions.create(model=SDAR, prompt=[5, 6, 7], max_tokens=4)
        assert server.http.get("/health").status_code == 503
    assert "Traceback" not in (tmp_path / "stderr.txt").read_text()
