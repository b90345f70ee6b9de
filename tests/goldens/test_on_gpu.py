"""Golden cases on a GPU: `pytest -m gpu`; all engine cases of all text families, in float32."""

from __future__ import annotations

import pytest
import torch

from tests.goldens.__main__ import replay_each, replay_together
from tests.goldens.replay import Mode
from tests.goldens.test_modes import engine_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODES = {
    "plain": Mode(device="cuda", graphs="off"),
    "graphs": Mode(device="cuda", graphs="on"),
    "graphs and ahead": Mode(device="cuda", graphs="on", overlap="device"),
}


@pytest.mark.parametrize("mode", MODES)
def test_all_cases_alone(mode: str) -> None:
    problems = {case.name: problem for case, problem in replay_each(engine_cases(), MODES[mode])}
    assert {name: problem for name, problem in problems.items() if problem is not None} == {}


def test_all_cases_together() -> None:
    found = replay_together(engine_cases(), 11, MODES["graphs and ahead"])
    assert {case.name: problem for case, problem in found if problem is not None} == {}
