"""`sfumato bench` against servers that run: text and pictures, figures that the server reports too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfumato.serve.cli import run
from tests.serve.running import KEY, SD3, SDAR, Server

BENCH = ["--num-requests", "8", "--warmup", "1", "--api-key", KEY]


def measured(path: Path) -> dict[str, Any]:
    """Return the only run of a file."""
    (found,) = json.loads(path.read_text())["runs"]
    return dict(found)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_text_is_measured(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], endpoint: str
) -> None:
    output = tmp_path / "run.json"
    options = ["--base-url", f"{server.url}/v1", "--model", SDAR, "--endpoint", endpoint, "--rate", "50"]
    lengths = ["--input-len", "24", "--output-len", "20", "--ignore-eos", "--prefix-len", "16"]
    extra = ["--extra-body", '{"algorithm": "low_confidence", "algorithm_parameters": {"threshold": 2.0}}']
    assert run(["bench", *BENCH, *options, *lengths, *extra, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "output tokens/s" in shown
    found = measured(output)
    assert found["summary"]["num_failed"] == 0
    assert {record["output_tokens"] for record in found["records"]} == {20}
    assert {record["counted_by"] for record in found["records"]} == {"usage"}
    # One token per forward, and the prompt's.
    assert 0.8 < found["summary"]["tokens_per_forward"] <= 1.0
    prompt_tokens = [record["prompt_tokens"] for record in found["records"]]
    if endpoint == "completions":
        # With a token for the text's beginning, where the model has one.
        assert all(39 <= count <= 41 for count in prompt_tokens)
    for record in found["records"]:
        times = [record["due"], record["sent"], *record["chunks"], record["ended"]]
        assert times == sorted(times)


def test_pictures_are_measured(drawing: Server, tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    options = ["--base-url", f"{drawing.url}/v1", "--model", SD3, "--endpoint", "images", "--steps", "4"]
    size = ["--size", "64x64", "--previews", "1", "--concurrency", "4"]
    assert run(["bench", *BENCH, *options, *size, "--output", str(output)]) == 0
    found = measured(output)
    assert found["summary"]["num_failed"] == 0
    assert found["summary"]["num_open_at_most"] == 4
    assert all(len(record["chunks"]) == 1 for record in found["records"])


def test_what_the_server_refuses_is_told(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--base-url", f"{server.url}/v1", "--model", SDAR]
    assert run(["bench", *BENCH, *options, "--extra-body", '{"nonsense": 1}']) == 1
    assert "8 requests failed: unknown field 'nonsense'" in capsys.readouterr().err
