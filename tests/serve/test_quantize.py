"""`sfumato quantize`, and serving what it has written."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.serve.cli import run


def test_a_model_is_written_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sdar-int8"
    assert run(["quantize", "sfumato-tiny-sdar", str(out)]) == 0
    assert "MiB of weights" in capsys.readouterr().out
    question = "Ben has 7 apples and buys 5 more. How many apples does Ben have?"
    assert run(["generate", question, "--model", str(out)]) == 0
    assert "12" in capsys.readouterr().out


def test_a_folder_that_holds_something_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert run(["quantize", "sfumato-tiny-sdar", str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
