"""`sfumato bench` against a server that answers by a script: options, tables, files, exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sfumato.evaluation import drawing
from sfumato.serve.cli import run
from sfumato.serve.commands.spreading import spread
from tests.evaluation.load.fake_server import MODEL, Script, fake_server

QUICK = ["--num-requests", "6", "--warmup", "2", "--input-len", "8"]


@pytest.fixture
def script() -> Script:
    return Script(first_pause=0.0, pause=0.0)


@pytest.fixture
def url(script: Script) -> Iterator[list[str]]:
    with fake_server(script) as base_url:
        yield ["bench", "--base-url", base_url]


def test_one_load_gives_figures_file_and_picture(
    script: Script, url: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plot = tmp_path / "run.json", tmp_path / "run.png"
    options = ["--concurrency", "2", "--goodput", "ttft:60000", "e2e:60000", "--api-key", "secret"]
    files = ["--output", str(output), "--plot", str(plot)]
    assert run([*url, *QUICK, *options, *files, "--extra-body", '{"top_k": 3}', "--ignore-eos"]) == 0
    shown = capsys.readouterr().out
    for words in ("fake, chat", "2 at once", "time to first text", "end to end", "p99", "tokens per forward"):
        assert words in shown
    assert "sent later than due" not in shown
    assert len(script.bodies) == 8
    assert all(body["top_k"] == 3 and body["ignore_eos"] is True for body in script.bodies)
    assert all(body["max_tokens"] == 128 for body in script.bodies)
    report = json.loads(output.read_text())
    assert "secret" not in output.read_text()
    assert (report["version"], report["model"], report["endpoint"]) == (1, MODEL, "chat")
    assert report["settings"]["workload"]["input_length"] == {"mean": 8, "spread": 0.0}
    assert report["settings"]["targets"] == {"ttft": 60.0, "e2e": 60.0}
    (found,) = report["runs"]
    assert found["load"]["concurrency"] == 2
    assert [record["index"] for record in found["records"]] == list(range(6))
    assert all(len(record["chunks"]) == 3 for record in found["records"])
    assert found["summary"]["goodput"]["share"] == 1.0
    assert found["summary"]["output_tokens"] == 6 * 12
    assert found["summary"]["tokens_per_forward"] == 3.0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_sweep_gives_one_picture(
    url: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plot = tmp_path / "sweep.json", tmp_path / "sweep.svg"
    options = ["--rate", "100", "200,inf", "--output", str(output), "--plot", str(plot)]
    assert run([*url, *QUICK, *options]) == 0
    shown = capsys.readouterr().out
    assert "sweep" in shown
    assert "sent later than due" in shown
    loads = [each["load"] for each in json.loads(output.read_text())["runs"]]
    assert [load["rate"] for load in loads] == [100.0, 200.0, None]
    assert all(load["is_open"] for load in loads)
    drawn = plot.read_text()
    assert "100/s" in drawn
    assert "all at once" in drawn


def test_pictures_are_measured(
    script: Script, url: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "run.svg"
    options = ["--endpoint", "images", "--size", "64x64", "--steps", "5", "--previews", "2"]
    assert run([*url, *QUICK, *options, "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "time to first preview" in shown
    assert "tokens/s" not in shown
    assert script.bodies[0]["num_inference_steps"] == 5
    assert script.bodies[0]["size"] == "64x64"
    assert "pictures/s" in plot.read_text()


def test_the_path_may_be_left_out(script: Script, url: list[str]) -> None:
    assert run(["bench", "--base-url", url[2].removesuffix("/v1"), *QUICK]) == 0
    assert len(script.bodies) == 8


def test_conversations_are_for_chat_alone(
    script: Script, url: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}')
    assert run([*url, *QUICK, "--dataset", str(path)]) == 0
    assert script.bodies[0]["messages"] == [{"role": "user", "content": "a"}]
    assert "max_tokens" not in script.bodies[0]
    del script.bodies[:]
    assert run([*url, *QUICK, "--dataset", str(path), "--endpoint", "completions"]) == 1
    assert f"--dataset {path} has messages; --endpoint completions takes texts" in capsys.readouterr().err
    assert script.bodies == []


def test_some_failures_are_shown_and_all_are_an_error(
    script: Script, url: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # The first two warm up.
    script.fails = lambda number: number in (3, 5)
    assert run([*url, *QUICK, "--concurrency", "1"]) == 0
    out, err = capsys.readouterr()
    assert "1 at once: 2 requests failed: no such field" in err
    assert "time to first text" in out
    script.fails = lambda number: True
    assert run([*url, *QUICK, "--concurrency", "1"]) == 1
    out, err = capsys.readouterr()
    assert "6 requests failed: no such field" in err
    assert "time to first text" not in out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--rate", "0"], "--rate '0' must be a number above 0"),
        (["--rate", "fast"], "--rate 'fast' must be a number above 0"),
        (["--concurrency", "1.5"], "--concurrency '1.5' must be a whole number of at least 1"),
        (["--concurrency", "1", "2", "--rate", "3"], "--concurrency 1,2 with --rate"),
        (["--burstiness", "0"], "--burstiness 0 must be above 0"),
        (["--goodput", "speed:3"], "'speed' is not one of ttft, tpot, e2e"),
        (["--goodput", "ttft"], "--goodput '' must be a number above 0"),
        (["--endpoint", "audio"], "--endpoint 'audio' is not one of chat, completions, images"),
        (["--model", "other"], "--model 'other'"),
        (["--extra-body", "{"], "--extra-body '{' is not JSON"),
        (["--dataset", "nowhere.jsonl"], "--dataset nowhere.jsonl"),
        (["--tokenizer", "nowhere"], "--tokenizer 'nowhere'"),
        (["--plot", "run.gif"], "--plot run.gif"),
        (["--output", "nowhere/run.json"], "--output nowhere/run.json: there is no folder nowhere"),
    ],
)
def test_every_wrong_option_is_one_line(
    script: Script, url: list[str], capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert run([*url, *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sfumato: error: ")
    assert err.count("\n") == 1
    assert reason in err
    assert script.bodies == []


def test_a_picture_needs_matplotlib(
    url: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    assert run([*url, "--plot", "run.png"]) == 1
    assert "sfumato[eval]" in capsys.readouterr().err


def test_a_whole_benchmark_loads_no_torch(url: list[str], tmp_path: Path) -> None:
    arguments = [*url, *QUICK, "--tokenizer", "sfumato-tiny-sdar", "--output", str(tmp_path / "run.json")]
    code = (
        "import sys\n"
        "from sfumato.serve.cli import run\n"
        f"assert run({arguments}) == 0\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'fastapi'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["counts"] == "tokens"


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--base-url", "http://127.0.0.1:9/v1"]) == 1
    assert "--base-url http://127.0.0.1:9/v1" in capsys.readouterr().err


def test_values_in_a_row_belong_to_their_option() -> None:
    options: Any = ("--rate",)
    assert spread(["--rate", "1", "2", "--seed", "3", "4"], options) == [
        *("--rate", "1", "--rate", "2"),
        *("--seed", "3", "4"),
    ]
    assert spread([], options) == []
