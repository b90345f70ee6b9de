"""`sfumato serve --profile`: steps recorded from the start, and between two calls; with the server's key."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from tests.serve.running import PIPELINES, SD3, SDAR, Server, serving


def ask(server: Server, max_tokens: int = 32) -> None:
    """Let the text model make some steps."""
    body = {"model": SDAR, "prompt": "Mia, 34", "max_tokens": max_tokens, "ignore_eos": True, "seed": 0}
    assert server.http.post("/v1/completions", json=body).status_code == 200


def step_names(path: Path) -> list[str]:
    """Return the names of the steps in a trace."""
    events = json.loads(path.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("name", "").startswith("step ")]


def test_steps_are_recorded_by_option_and_by_endpoint(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    options = ["--profile", str(folder), "--profile-steps", "3", "--profile-start", "1"]
    with serving(tmp_path, *options, SDAR, str(PIPELINES[SD3])) as server:
        ask(server)
        (first,) = folder.iterdir()
        assert first.name.startswith(f"{SDAR}-")
        assert len(step_names(first)) == 3
        for path in ("/start_profile", "/stop_profile"):
            assert httpx.post(f"{server.url}{path}").status_code == 401
        # Of both models; the one that draws gives up what its option said.
        assert server.http.post("/start_profile").json() == {"status": "recording"}
        conflict = server.http.post("/start_profile", json={"model": SDAR})
        assert conflict.status_code == 409
        assert "stop it first" in conflict.json()["error"]["message"]
        ask(server)
        stopped = server.http.post("/stop_profile").json()
        assert stopped["status"] == "stopped"
        drawn, written = sorted(Path(path) for path in stopped["files"])
        assert {first, drawn, written} == set(folder.iterdir())
        assert drawn.name.startswith(f"{SD3}-")
        assert step_names(drawn) == []
        assert len(step_names(written)) > 2
        assert server.http.post("/start_profile", json={"model": SDAR, "num_steps": 2}).status_code == 200
        ask(server)
        assert server.http.post("/stop_profile").json()["files"] == []
        (last,) = set(folder.iterdir()) - {first, drawn, written}
        assert len(step_names(last)) == 2
        assert server.http.post("/start_profile", json={"num_steps": 0}).status_code == 400
        assert server.http.post("/start_profile", json={"model": "x"}).status_code == 404
        assert server.http.get("/health").status_code == 200


def test_without_the_option_there_is_no_endpoint(server: Server) -> None:
    assert server.http.post("/start_profile").status_code == 404
