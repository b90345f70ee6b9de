"""Image cases of the repository in every mode; each alone is replayed by `make test` too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.goldens.__main__ import main

DATA = Path(__file__).resolve().parent.parent / "data" / "goldens" / "images"


@pytest.mark.parametrize(
    "mode",
    [
        ["--together", "1"],
        ["--together", "2", "--deterministic", "4"],
        ["--together", "3", "--overlap"],
        ["--together", "4", "--data-parallel", "2"],
        ["--together", "5", "--disaggregate"],
        ["--disaggregate", "sockets", "--checkpoints", "sd3-tiny"],
    ],
    ids=" ".join,
)
def test_cases_in_every_mode(mode: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DATA), *mode]) == 0
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert said == f"{2 if 'sd3-tiny' in mode else 15} passed, 0 failed, 0 skipped"


def test_what_a_mode_cannot_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DATA), "--tensor-parallel", "2"]) == 0
    assert "REFUSED" in capsys.readouterr().out
