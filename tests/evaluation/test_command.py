"""`sfumato eval` as it is typed: errors in one line, exit statuses, what is written where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfumato.evaluation import drawing, in_process
from sfumato.serve.cli import run

FEW = ["--limit", "2", "--threads", "1", "--dtype", "float32"]


@pytest.mark.parametrize(
    ("arguments", "reason", "status"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl", 1),
        (["rewriting", "--limit", "0"], "--limit", 2),
        (["rewriting", "--prompt", "loud"], "--prompt", 1),
        (["rewriting", "--shots", "2"], "--shots-file", 1),
        (["rewriting", "--shots", "2", "--shots-file", "nowhere.jsonl"], "nowhere.jsonl", 1),
        (["rewriting", "--sweep", "threshold"], "--sweep", 1),
        (["rewriting", "--algorithm-parameters", "{"], "--algorithm-parameters", 1),
        (["rewriting", "--api-key", "x"], "--url", 1),
        (["rewriting", "--url", "http://127.0.0.1:1/v1", "--threads", "1"], "--threads 1 and --url", 1),
        (["rewriting", "--url", "http://127.0.0.1:1/v1"], "http://127.0.0.1:1/v1", 1),
        (["rewriting", "--model", "no-such-model"], "no-such-model", 1),
        (["rewriting", "--algorithm", "guess"], "guess", 1),
        (["rewriting", "--sweep", "speed=1"], "speed", 1),
        (["rewriting", "--sweep", "confidence_threshold=-1"], "confidence_threshold is -1", 1),
        (["rewriting", "--block-length", "7"], "block_length 7", 1),
    ],
)
def test_every_user_error_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], reason: str, status: int
) -> None:
    assert run(["eval", *arguments, "--out", str(tmp_path)]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sfumato: error: ")
    assert err.count("\n") == 1
    assert reason in err
    assert list(tmp_path.iterdir()) == []


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("word-problems", "--sweep", "--shots-file", "--url", "Ctrl-C"):
        assert word in shown


def test_a_run_writes_answers_report_and_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["eval", "extraction", *FEW, "--plot"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "100.0 %" in out
    assert "* what is served by default" in out
    folder = Path("sfumato-eval") / "extraction-sfumato-tiny-sdar"
    names = {path.name for path in folder.iterdir()}
    assert names == {"answers-sdar.jsonl", "report.json", "curve.png", "curve.svg"}


def test_failures_are_named_and_end_with_status_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join('{"question": "%s", "answer": "7"}\n' % ("12+7= " * 400) for _ in range(8)))
    assert run(["eval", str(path), *FEW[2:], "--out", str(tmp_path / "out"), "--no-plot"]) == 1
    _, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("sfumato: question 1 failed (sdar): the prompt's")
    assert lines[-1].startswith("sfumato: error: 8 questions failed")


def test_ctrl_c_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(in_process.InProcess, "run", interrupted)
        assert run(["eval", "extraction", *FEW, "--out", str(tmp_path), "--no-plot"]) == 130
    assert f"stopped; answers are in {tmp_path}" in capsys.readouterr().err
    assert run(["eval", "extraction", *FEW, "--out", str(tmp_path), "--no-plot"]) == 0


def test_a_picture_is_asked_for_in_vain_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    assert run(["eval", "extraction", *FEW, "--out", str(tmp_path), "--plot"]) == 1
    assert "sfumato[eval]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run(["eval", "extraction", *FEW, "--out", str(tmp_path)]) == 0
    assert "no picture" in capsys.readouterr().err
    assert not (tmp_path / "curve.png").exists()
