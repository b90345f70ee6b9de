"""The stream of steps: who had rows in them, only while somebody watches, and only with a key."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from sfumato.core.messages import Gauges, StepStats, Turn
from sfumato.serve.steps import StepFeed
from tests.serve.running import LLADA, SDAR, SLOW, Server, serving


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


@dataclass
class Engines:
    """Stands for a model and its engines; notes whether they are watched."""

    watched: list[bool] = field(default_factory=list)

    @property
    def client(self) -> Engines:
        return self

    def watch(self, *, is_on: bool) -> None:
        self.watched.append(is_on)


def turn(*launch_ids: int, gauges: Gauges | None = None) -> Turn:
    steps = [
        StepStats(launch_id=each, kind="denoise", rows=1, tokens=1, host_seconds=0.0, device_seconds=0.0)
        for each in launch_ids
    ]
    return Turn(steps=tuple(steps), gauges=gauges)


def test_engines_are_watched_from_the_first_watcher_to_the_last() -> None:
    engines = Engines()
    feed = StepFeed(engines)  # type: ignore[arg-type]
    first, second = feed.watch(), feed.watch()
    first.close()
    first.close()
    assert engines.watched == [True]
    feed.push(turn(1))
    second.close()
    assert engines.watched == [True, False]
    assert [step.launch_id for step in second.take()[0]] == [1]
    assert first.take() == ([], 0)


def test_a_slow_watcher_loses_the_oldest_steps_and_is_told_how_many() -> None:
    feed = StepFeed(Engines())  # type: ignore[arg-type]
    watcher = feed.watch()
    gauges = Gauges(waiting=1, running=2, pages_free=3, pages_leased=4, pages_cached=5, retractions=6)
    feed.push(turn(*range(300), gauges=gauges))
    feed.push(turn())
    assert feed.gauges == gauges
    steps, num_dropped = watcher.take()
    assert [step.launch_id for step in steps] == list(range(44, 300))
    assert num_dropped == 44
    assert watcher.take() == ([], 0)


def test_a_watcher_does_not_keep_a_server_from_ending(tmp_path: Path) -> None:
    with serving(tmp_path, "--dtype", "float32", SDAR) as server:
        with server.http.stream("GET", "/v1/engine/steps") as answer:
            lines = answer.iter_lines()
            next(lines)
            server.signal()
            assert list(lines)[-2] == "data: [DONE]"
        assert server.wait() == 0
        assert server.left_behind() == []
    assert "Traceback" not in (tmp_path / "stderr.txt").read_text()
