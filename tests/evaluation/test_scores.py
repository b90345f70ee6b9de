"""Figures against values computed by hand."""

from __future__ import annotations

import math

import pytest

from sfumato.evaluation.journal import Record
from sfumato.evaluation.scores import accuracy_under_parallelism, score, wilson_interval
from sfumato.evaluation.sweep import plan_curves
from tests.evaluation.scripted import CARD


def record(name: str, **fields: object) -> Record:
    return Record(id=name, prompt_sha256="", expected="1", **fields)  # type: ignore[arg-type]


def test_aup_of_hand_computed_pairs() -> None:
    # 80 + (78 exp(-0.075) + 80) / 2; (4, 70) lies below 80 - 5 and is left out.
    pairs = [(4.0, 70.0), (2.0, 78.0), (1.0, 80.0)]
    assert accuracy_under_parallelism(pairs, 80.0) == pytest.approx(156.18200, abs=1e-5)
    # Against a better method: 80 + (78 exp(-0.66) + 80 exp(-0.6)) / 2.
    assert accuracy_under_parallelism(pairs, 100.0) == pytest.approx(122.10967, abs=1e-5)


def test_aup_of_published_pairs() -> None:
    # GSM8K-CoT of the d3LLM leaderboard (data_llada.yaml); the best of all methods there is 74.98.
    fast_dllm = accuracy_under_parallelism([(1.0, 74.79), (2.77, 74.68)], 74.98)
    d3llm = accuracy_under_parallelism([(1.0, 74.02), (9.11, 73.09)], 74.98)
    weights = [math.exp(-3 * (1 - y / 74.98)) for y in (74.79, 74.68)]
    assert fast_dllm == pytest.approx(74.79 + 1.77 * (74.79 * weights[0] + 74.68 * weights[1]) / 2)
    assert fast_dllm == pytest.approx(205.78, abs=0.01)
    assert d3llm is not None
    assert d3llm > 3 * fast_dllm


def test_aup_at_its_edges() -> None:
    assert accuracy_under_parallelism([], 90.0) is None
    assert accuracy_under_parallelism([(3.0, 50.0)], 90.0) == 150.0
    assert accuracy_under_parallelism([(3.0, 0.0), (4.0, 0.0)], 0.0) == 0.0
    # Exactly 5 points may be lost; of equal rho the most accurate goes first.
    assert accuracy_under_parallelism([(1.0, 90.0), (2.0, 85.0)], 90.0) > 90.0
    assert accuracy_under_parallelism([(1.0, 84.9), (1.0, 90.0)], 90.0) == 90.0
    # Without loss it is the area under the curve.
    assert accuracy_under_parallelism([(1.0, 90.0), (5.0, 90.0)], 90.0) == pytest.approx(450.0)


def test_wilson_interval() -> None:
    assert wilson_interval(8, 10) == pytest.approx((49.0162, 94.3318), abs=1e-4)
    low, high = wilson_interval(0, 20)
    assert (low, high) == (0.0, pytest.approx(16.1125, abs=1e-4))
    assert wilson_interval(20, 20) == (pytest.approx(83.8875, abs=1e-4), 100.0)


def test_a_point_counts_everything() -> None:
    (curve,) = plan_curves(CARD, [], [], {})
    records = [
        record("1", correct=True, tokens=12, nfe=3, denoise_steps=2, seconds=1.0, wall_seconds=1.0),
        # The cache held the whole prompt: one forward was spared.
        record(
            "2", tokens=6, nfe=2, denoise_steps=2, cached_tokens=16, finish_reason="length", wall_seconds=0.5
        ),
        record("3", error="refused", wall_seconds=0.5),
    ]
    point = score(curve.settings[0], records)
    assert (point.num_questions, point.num_correct, point.num_failed, point.num_cut_off) == (3, 1, 1, 1)
    assert point.accuracy == pytest.approx(100 / 3)
    assert point.num_spared_prefills == 1
    assert point.tpf == pytest.approx(18 / 6)
    assert point.mean_request_tpf == pytest.approx((12 / 3 + 6 / 3) / 2)
    assert (point.mean_nfe, point.mean_tokens) == (3.0, 9.0)
    assert point.tokens_per_second == pytest.approx(18 / 2)
    assert point.failures == (("3", "refused"),)
    nothing = score(curve.settings[0], records[2:])
    assert (nothing.tpf, nothing.mean_nfe, nothing.tokens_per_second) == (None, None, None)
