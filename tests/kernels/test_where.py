"""Where kernels run, and what is said where they do not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sfumato.models import kernels
from sfumato.models.kernels import keeping, run_on, why_not

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_a_cpu_runs_none() -> None:
    assert not run_on(torch.zeros(1))


def test_the_trial_runs() -> None:
    assert why_not.__wrapped__(DEVICE) is None


def test_what_does_not_run_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> None:
        raise OSError("no C compiler was found\nand more")

    monkeypatch.setattr(keeping, "keep_rows", broken)
    assert why_not.__wrapped__(DEVICE) == "OSError: no C compiler was found"
    assert "runs no Triton kernel: OSError: no C compiler was found" in capsys.readouterr().err
    monkeypatch.setattr(keeping, "keep_rows", lambda *arguments: None)
    assert why_not.__wrapped__(DEVICE) == "RuntimeError: a kernel that copies rows copied something else"
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert why_not.__wrapped__(DEVICE) == "triton is not installed"
