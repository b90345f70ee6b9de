"""Decoding algorithms against plain loops written from the papers, over random confidences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.core.spec import Decoding
from sfumato.errors import NotSupported, RequestError
from sfumato.text.decoding.fast_dllm import FastDLLM
from sfumato.text.decoding.llada import LLaDA
from sfumato.text.decoding.low_confidence import LowConfidence
from sfumato.text.decoding.protocol import Algorithm, Statistics, View
from sfumato.text.decoding.registry import ALGORITHMS, algorithm_class, describe, make_algorithm
from sfumato.text.decoding.sdar import SDAR

WIDTH = 8

floats = st.floats(0.0078125, 0.9990234375, width=32)
confidences = st.lists(floats, min_size=WIDTH, max_size=WIDTH, unique=True)
flags = st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH).filter(any)


def decide(
    algorithms: Sequence[Algorithm], rows: list[tuple[list[float], list[bool], int]]
) -> list[list[int]]:
    """Return the chosen positions of each row: (confidence, undecided, step)."""
    undecided = torch.tensor([row[1] for row in rows])
    view = View(
        token_ids=torch.zeros(undecided.shape, dtype=torch.long),
        eligible=undecided,
        editable=~undecided,
        focus=undecided,
        is_given=torch.zeros_like(undecided),
        step=torch.tensor([row[2] for row in rows]),
        masks_at_start=torch.full((len(rows),), WIDTH),
        block_length=[WIDTH] * len(rows),
        num_blocks=[1] * len(rows),
        mask_token_id=[0] * len(rows),
    )
    confidence = torch.tensor([row[0] for row in rows])
    statistics = Statistics(
        token=torch.ones_like(view.token_ids),
        confidence=confidence,
        entropy=1 - confidence,
        margin=confidence / 2,
        top_ids=torch.ones(*confidence.shape, 1, dtype=torch.long),
        top_probabilities=confidence[..., None],
    )
    outcome = type(algorithms[0]).decide(algorithms, view, statistics, [None] * len(rows))
    return [torch.nonzero(row).flatten().tolist() for row in outcome.transfer]


def by_confidence(row: tuple[list[float], list[bool], int]) -> list[int]:
    """Return the undecided positions, the most confident first."""
    return sorted((p for p in range(WIDTH) if row[1][p]), key=lambda p: -row[0][p])


def schedule(steps: int, step: int) -> int:
    """Return how many of WIDTH positions a step takes."""
    return WIDTH // steps + (step < WIDTH % steps)


@settings(deadline=None)
@given(st.lists(st.tuples(confidences, flags, st.integers(0, 3)), min_size=1, max_size=4), st.integers(4, 8))
def test_llada_takes_the_scheduled_number(rows: list[Any], steps: int) -> None:
    expected = [sorted(by_confidence(row)[: schedule(steps, row[2])]) for row in rows]
    assert decide([LLaDA(steps=steps)] * len(rows), rows) == expected


@settings(deadline=None)
@given(
    st.lists(st.tuples(confidences, flags, st.integers(0, 3)), min_size=1, max_size=4),
    st.lists(st.floats(0.0, 1.1), min_size=4, max_size=4),
)
def test_fast_dllm_takes_the_best_and_all_that_reach_the_threshold(
    rows: list[Any], thresholds: list[float]
) -> None:
    expected = []
    for row, threshold in zip(rows, thresholds, strict=False):
        order = by_confidence(row)
        limit = float(torch.tensor(threshold))
        expected.append(sorted([order[0], *(p for p in order[1:] if row[0][p] >= limit)]))
    algorithms = [FastDLLM(threshold=threshold) for threshold, _ in zip(thresholds, rows, strict=False)]
    assert decide(algorithms, rows) == expected


@settings(deadline=None)
@given(st.tuples(confidences, flags, st.just(0)), st.floats(0.1, 3.0))
def test_dinfer_factor_takes_a_leading_run(row: Any, factor: float) -> None:
    order = by_confidence(row)
    limits = (1 - torch.tensor(factor) / (torch.arange(WIDTH) + 2)).tolist()
    run = next((i for i, p in enumerate(order) if i > 0 and row[0][p] < limits[i]), len(order))
    if run == len(order) - 1:
        run = len(order)
    assert decide([FastDLLM(factor=factor)], [row]) == [sorted(order[:run])]


@settings(deadline=None)
@given(st.tuples(confidences, flags, st.just(0)), st.floats(0.0, 1.1))
def test_low_confidence_is_strict(row: Any, threshold: float) -> None:
    order = by_confidence(row)
    limit = float(torch.tensor(threshold))
    expected = sorted({order[0], *(p for p in order if row[0][p] > limit)})
    assert decide([LowConfidence(threshold=threshold)], [row]) == [expected]


def test_low_confidence_at_its_own_threshold_takes_one() -> None:
    row = ([0.5] * WIDTH, [True] * WIDTH, 0)
    assert decide([LowConfidence(threshold=0.5)], [row]) == [[0]]
    assert decide([FastDLLM(threshold=0.5)], [row]) == [list(range(WIDTH))]


@settings(deadline=None)
@given(
    st.tuples(confidences, flags, st.integers(0, 3)),
    st.sampled_from(["low_confidence_static", "low_confidence_dynamic", "sequential"]),
    st.floats(0.0, 1.0),
    st.integers(4, 8),
)
def test_sdar_strategies(row: Any, strategy: str, threshold: float, steps: int) -> None:
    count = schedule(steps, row[2])
    order = by_confidence(row)
    above = [p for p in order if row[0][p] > float(torch.tensor(threshold))]
    if strategy == "sequential":
        expected = sorted(order)[:count]
    elif strategy == "low_confidence_dynamic" and len(above) >= count:
        expected = sorted(above)
    else:
        expected = sorted(order[:count])
    algorithm = SDAR(remasking_strategy=strategy, confidence_threshold=threshold, denoising_steps=steps)
    assert decide([algorithm], [row]) == [expected]


@pytest.mark.parametrize("name", [name for name in sorted(ALGORITHMS) if not algorithm_class(name).renoises])
def test_every_algorithm_always_decides_something(name: str) -> None:
    algorithm = make_algorithm(Decoding(algorithm=name))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        row = (torch.rand(WIDTH, generator=generator).tolist(), [True] * WIDTH, 0)
        assert decide([algorithm], [row])[0]


@pytest.mark.parametrize(
    ("name", "parameters", "field"),
    [
        ("nobody", {}, "algorithm"),
        ("sdar", {"threshold": 0.5}, "algorithm_parameters.threshold"),
        ("sdar", {"remasking_strategy": "entropy_bounded"}, "algorithm_parameters.remasking_strategy"),
        ("fast_dllm", {"threshold": -0.1}, "algorithm_parameters.threshold"),
        ("fast_dllm", {"threshold": "high"}, "algorithm_parameters.threshold"),
        ("fast_dllm", {"threshold": float("nan")}, "algorithm_parameters.threshold"),
        ("low_confidence", {"threshold": None}, "algorithm_parameters.threshold"),
        ("low_confidence", {"max_steps": 0}, "algorithm_parameters.max_steps"),
        ("llada", {"steps": 2.5}, "algorithm_parameters.steps"),
        ("llada", {"steps": True}, "algorithm_parameters.steps"),
        ("llada", {"is_reference": True}, "algorithm_parameters.is_reference"),
        ("llada", {"spares_eos": True}, "algorithm_parameters.spares_eos"),
    ],
)
def test_bad_parameters_are_refused_by_name(name: str, parameters: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        make_algorithm(Decoding(algorithm=name, parameters=parameters))
    assert caught.value.field == field
    assert (name if field == "algorithm" else field.split(".")[-1]) in str(caught.value)


def test_steps_must_fit_the_canvas_and_guidance_the_model() -> None:
    with pytest.raises(RequestError, match="multiple"):
        LLaDA(steps=7).check(block_length=8, num_blocks=2, is_bidirectional=True)
    with pytest.raises(NotSupported, match="bidirectional"):
        LLaDA(cfg_scale=0.5).check(block_length=8, num_blocks=2, is_bidirectional=False)
    with pytest.raises(RequestError, match="block length"):
        SDAR(denoising_steps=9).check(block_length=8, num_blocks=2, is_bidirectional=False)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_parameters_are_described(name: str) -> None:
    for entry in describe(name):
        assert {"name", "type", "default", "doc"} <= entry.keys()
        assert not entry["name"].startswith("is_reference")
