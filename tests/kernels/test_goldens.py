"""Golden cases through the kernels, all of a step: layout over pages, norms, attention, statistics.

Interpreted where there is no GPU, so that a few small cases must do; on a GPU these are `test_on_gpu.py`'s.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sfumato.models import experts, fp8, layers, paged, routing
from sfumato.models.kernels import attention
from sfumato.text import paged_batching, read_once
from tests.goldens.__main__ import PLANS, replay_each
from tests.goldens.replay import Mode, load_checkpoint
from tests.goldens.test_modes import engine_cases

CASES = {
    "generate_sdar_sample": 1,
    "fastdllm_dual_cache": 1,
    "d3llm_multi_block_kv_cache": 1,
    "generate_transformers": 1,
    "generate_dinfer_threshold": 1,
}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("kind", CASES)
def test_cases_through_the_kernels(monkeypatch: pytest.MonkeyPatch, kind: str, graphs: str) -> None:
    for module in (experts, fp8, layers, paged, routing, paged_batching, read_once):
        monkeypatch.setattr(module, "run_on", lambda tensor: True)
    # Recorded forwards divide the keys of their few programs.
    monkeypatch.setattr(attention, "num_cores_of", lambda keys: 8 if graphs == "on" else 0)
    # What is packed for a CPU's products is there no more for a kernel's.
    monkeypatch.setattr(experts.Experts, "pack", lambda self: None)
    load_checkpoint.cache_clear()
    assert kind in PLANS
    cases = sorted(
        (case for case in engine_cases() if case.kind == kind), key=lambda case: case.path.stat().st_size
    )[: CASES[kind]]
    problems = {case.name: problem for case, problem in replay_each(cases, Mode(graphs=graphs))}
    load_checkpoint.cache_clear()
    assert {name: problem for name, problem in problems.items() if problem is not None} == {}
