"""dInfer's credit against the plain matrix that its source describes: every position, every token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato.text.decoding.dinfer import DInfer
from tests.goldens.sources import ArgmaxSource
from tests.goldens.steps import Bench, TableModel

WIDTH, VOCAB, MASK, STEPS = 8, 24, 23, 7


def naive(logits: Tensor, threshold: float) -> list[list[int]]:
    """Return the tokens after each step. logits: f32[steps, W, V]."""
    ids, credit = [MASK] * WIDTH, torch.zeros(WIDTH, VOCAB, dtype=torch.float64)
    canvases = []
    for step, raw in enumerate(logits.double()):
        if step:
            credit *= 0.8
        masked = [position for position in range(WIDTH) if ids[position] == MASK]
        best = raw.softmax(-1).max(-1)
        for position in masked:
            credit[position, best.indices[position]] += best.values[position] ** 0.2
        fused = (raw + 0.7 * torch.log(credit + 1)).softmax(-1).max(-1)
        open_now = [position for position in masked if int(fused.indices[position]) != MASK]
        limit = min(threshold, max((float(fused.values[p]) for p in open_now), default=0.0) - 1e-5)
        for position in open_now:
            if float(fused.values[position]) >= limit:
                ids[position] = int(fused.indices[position])
        canvases.append(list(ids))
    return canvases


@pytest.mark.parametrize("seed", range(8))
def test_credit_is_the_matrix(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Near the same logits in every step, so that tokens stay the best ones and credit decides.
    base = 2 * torch.randn(1, WIDTH, VOCAB, generator=generator)
    logits = base + torch.randn(STEPS, WIDTH, VOCAB, generator=generator)
    bench = Bench(DInfer(rule="credit", threshold=0.6), VOCAB, MASK, TableModel())
    work = bench.add([MASK] * WIDTH, [False] * WIDTH, ArgmaxSource())
    for step, wanted in enumerate(naive(logits, 0.6)):
        bench.step(logits[step][None])
        assert work.canvas.token_ids.tolist() == wanted
