"""One node, two replicas: the application of a deployment answers as one process does."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from sfumato.config import EngineConfig
from sfumato.engine.engine import Engine
from sfumato.engine.frontend import SamplingParams
from tests.deploy.clusters import Driver, driving

MODEL = "sfumato-tiny-sdar"
DEPLOYMENT: dict[str, Any] = {
    "models": {MODEL: {"dtype": "float32", "threads": 1, "kv-memory": "16M", "replicas": 2}},
    "recovery": {"silence": 2},
}
PROMPTS = [[5 + (number * 31 + place * 7) % 190 for place in range(8 + number)] for number in range(8)]

pytestmark = pytest.mark.ray


def body(prompt: list[int], **options: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": 48,
        "seed": 3,
        "ignore_eos": True,
        "return_token_ids": True,
        **options,
    }


def whole(driver: Driver, prompt: list[int]) -> list[int]:
    answer = driver.http.post("/v1/completions", json=body(prompt))
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def streamed(driver: Driver, prompt: list[int]) -> list[int]:
    found: list[int] = []
    with driver.http.stream("POST", "/v1/completions", json=body(prompt, stream=True)) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                for choice in event["choices"]:
                    found += choice["token_ids"]
    return found


def test_a_deployment_answers_as_one_process_does() -> None:
    local = Engine.load(EngineConfig(model=MODEL, dtype="float32", num_threads=1, kv_memory=16 << 20))
    params = SamplingParams(max_tokens=48, seed=3, ignore_eos=True)
    expected = [choice.token_ids for choice in local.generate(PROMPTS, params)]
    with driving(DEPLOYMENT) as driver, ThreadPoolExecutor(8) as pool:
        assert driver.http.get("/v1/models").json()["data"][0]["id"] == MODEL
        assert list(pool.map(lambda prompt: whole(driver, prompt), PROMPTS)) == expected
        assert list(pool.map(lambda prompt: streamed(driver, prompt), PROMPTS)) == expected
        assert driver.http.get("/health").json()["status"] == "ok"
        refused = driver.http.post("/v1/completions", json=body([], max_tokens=4))
        assert refused.status_code == 400
        # An engine is killed while all of them run: each is answered all the same.
        asking = [pool.submit(streamed, driver, prompt) for prompt in PROMPTS]
        time.sleep(0.2)
        os.kill(engines(driver)[0], signal.SIGKILL)
        assert [each.result() for each in asking] == expected
        # The id that a client sees is in the lines of both sides.
        named = driver.http.post("/v1/completions", json=body(PROMPTS[0])).json()["id"]
        time.sleep(0.2)
        logs = list(driver.folder.glob("ray/session_latest/logs/serve/replica_*.log"))
        found = {path.name.split("_")[2] for path in logs if f"request {named}-0" in path.read_text()}
        assert found == {"front", MODEL}
        metrics = driver.http.get("/metrics").text
        assert f'sfumato_steps_total{{kind="denoise",model="{MODEL}"}}' in metrics


def engines(driver: Driver) -> list[int]:
    """Return the engine processes of a cluster."""
    folder = str(driver.folder)
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "sfumato.engine.process" in (process.info["cmdline"] or ()) and folder in str(process.environ())
    ]
