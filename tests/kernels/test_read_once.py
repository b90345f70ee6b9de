"""Statistics of rows that kernels read, against the pass in torch over the same readings."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sfumato.core.spec import Sampling
from sfumato.text import read_once, statistics
from sfumato.text.decoding.protocol import Transform, Wanted
from sfumato.text.random_source import CounterSource
from sfumato.text.statistics import PackedStatistics, compute_statistics
from sfumato.text.transform import Frontier, Reading

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 1000
ROWS = 2
EVERYTHING = Wanted(best=True, entropy=True, margin=True)


def reading(number: int, **changes: Any) -> Reading:
    """Return a reading of ROWS rows."""
    at = np.arange(ROWS * number, ROWS * (number + 1))
    given: dict[str, Any] = {
        "positions": at,
        "hidden_rows": at,
        "sampling": Sampling(),
        "transform": Transform(),
        "random_source": CounterSource(number),
        "block": 1,
        "step": 2,
        "wanted": EVERYTHING,
    }
    return Reading(**(given | changes))


def readings() -> list[Reading]:
    """Return one of each kind."""
    allowed = np.zeros(VOCAB, dtype=np.bool_)
    allowed[5:90] = True
    warm = Sampling(temperature=0.8)
    filtered = Sampling(temperature=1.3, top_k=40, top_p=0.8)
    apart = Transform(filtered_confidence=True)
    return [
        reading(0),
        reading(1, excluded_ids=(3, 7)),
        reading(2, sampling=warm),
        reading(3, sampling=filtered),
        reading(4, sampling=filtered, transform=dataclasses.replace(apart, top_p_first=True)),
        reading(5, sampling=Sampling(top_p=0.4), transform=Transform(filters_greedy=True)),
        reading(6, sampling=Sampling(temperature=1.0), transform=apart),
        reading(7, transform=Transform(guidance_scale=0.5), guided_rows=np.arange(ROWS)),
        reading(8, sampling=Sampling(temperature=0.5, logit_bias={9: 4.0})),
        reading(9, frontier=Frontier(19, allowed), sampling=warm),
        reading(10, num_alternatives=2),
        reading(11, transform=Transform(confidence_excluded_ids=(1,))),
        reading(12, own_ids=np.arange(ROWS), own_penalty=1.5, even_share=0.01),
        reading(13, asked_ids=np.arange(2 * ROWS).reshape(ROWS, 2), wanted=Wanted()),
    ]


def compute(
    monkeypatch: pytest.MonkeyPatch, hidden: Tensor, asked: list[Reading], *, once: bool, rows: int = 1000
) -> PackedStatistics:
    """Run the pass; rows: of a float32 chunk."""
    monkeypatch.setattr(read_once, "run_on", lambda tensor: once)
    return compute_statistics(
        hidden, lambda states: states, asked, vocab_size=VOCAB, chunk_bytes=rows * VOCAB * 4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_say_what_torch_says(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(ROWS * len(readings()), VOCAB, generator=generator) * 3).to(dtype).to(DEVICE)
    expected = compute(monkeypatch, hidden, readings(), once=False)
    found = compute(monkeypatch, hidden, readings(), once=True)
    differing = torch.nonzero(found.token != expected.token).flatten()
    # A bfloat16 row has equal best logits; torch's maximum takes any of them.
    logits = hidden.float()
    assert bool(
        (logits[differing, found.token[differing]] == logits[differing, expected.token[differing]]).all()
    )
    assert len(differing) == 0 or dtype is torch.bfloat16
    same = found.token == expected.token
    assert torch.equal(found.is_finite, expected.is_finite)
    for name in ("confidence", "margin", "entropy"):
        one, other = getattr(found, name)[same], getattr(expected, name)[same]
        torch.testing.assert_close(
            one[: ROWS * 13 - len(differing)], other[: ROWS * 13 - len(differing)], atol=2e-5, rtol=2e-5
        )
    assert found.top_ids is not None
    assert expected.top_ids is not None
    assert torch.equal(found.top_ids[10 * ROWS : 11 * ROWS], expected.top_ids[10 * ROWS : 11 * ROWS])
    assert found.asked_logprobs is not None
    assert expected.asked_logprobs is not None
    own = slice(13 * ROWS, None)
    torch.testing.assert_close(found.asked_logprobs[own], expected.asked_logprobs[own])


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = (torch.randn(ROWS * 14, VOCAB, generator=torch.Generator().manual_seed(1)) * 3).to(DEVICE)
    whole = compute(monkeypatch, hidden, readings(), once=True)
    parts = compute(monkeypatch, hidden, readings(), once=True, rows=1)
    assert torch.equal(whole.token, parts.token)
    torch.testing.assert_close(whole.confidence, parts.confidence)


def test_which_readings_take_the_pass_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_once, "run_on", lambda tensor: True)
    hidden = torch.zeros(1)
    chosen = [read_once.is_read_once(one, hidden) for one in readings()]
    assert chosen == [True] * 10 + [False, False, True, False]
    monkeypatch.setattr(read_once, "run_on", lambda tensor: False)
    assert not any(read_once.is_read_once(one, hidden) for one in readings())


def test_no_float32_copy_of_plain_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = statistics.read_once
    monkeypatch.setattr(
        statistics, "read_once", lambda logits, pieces: seen.append(logits.dtype) or plain(logits, pieces)
    )
    hidden = torch.zeros(ROWS * 14, VOCAB, dtype=torch.bfloat16, device=DEVICE)
    compute(monkeypatch, hidden, readings()[:7], once=True)
    compute(monkeypatch, hidden, readings()[7:8], once=True)
    assert seen == [torch.bfloat16, torch.float32]
