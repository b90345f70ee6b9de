"""Goldens in every mode: one case of each kind always, all of them with the slow tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.goldens.__main__ import PLANS, read_supported, replay_each, replay_together
from tests.goldens.cases import Case, find_cases
from tests.goldens.replay import Mode, end_ranks

DATA = Path(__file__).resolve().parent.parent / "data" / "goldens"
MODES = {
    "overlap": Mode(overlap="on"),
    "ahead": Mode(overlap="device"),
    "graphs": Mode(graphs="on"),
    "graphs and ahead": Mode(graphs="on", overlap="device"),
    "replicas": Mode(num_replicas=2),
    "replicas and overlap": Mode(num_replicas=2, overlap="on"),
    "two ranks": Mode(tensor_parallel=2),
    "two ranks and overlap": Mode(tensor_parallel=2, overlap="on"),
}


@pytest.fixture(autouse=True)
def _no_rank_is_left() -> Iterator[None]:
    yield
    end_ranks()


def engine_cases() -> list[Case]:
    """Return every case that is a request, those of one checkpoint together."""
    families = {family for family, _, _ in read_supported()}
    cases = [case for family in families for case in find_cases(DATA / family) if case.kind in PLANS]
    return sorted(cases, key=lambda case: (case.checkpoint, case.name))


def one_of_each_kind(cases: list[Case]) -> list[Case]:
    """Return one case of each kind, on few checkpoints: starting ranks takes longer than a case."""
    by_checkpoint: dict[str, dict[str, Case]] = {}
    for case in cases:
        by_checkpoint.setdefault(case.checkpoint, {}).setdefault(case.kind, case)
    chosen: dict[str, Case] = {}
    while missing := {case.kind for case in cases} - chosen.keys():
        most = max(by_checkpoint.values(), key=lambda kinds: len(kinds.keys() & missing))
        chosen |= {kind: most[kind] for kind in sorted(most.keys() & missing)}
    return list(chosen.values())


@pytest.mark.parametrize("mode", [mode for mode in MODES if "and" not in mode])
def test_one_case_of_each_kind(mode: str) -> None:
    cases = one_of_each_kind(engine_cases())
    assert len(cases) > 20
    problems = {case.name: problem for case, problem in replay_each(cases, MODES[mode])}
    assert {name: problem for name, problem in problems.items() if problem is not None} == {}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_all_cases(mode: str) -> None:
    cases = engine_cases()
    problems = [*replay_each(cases, MODES[mode]), *replay_together(cases, 11, MODES[mode])]
    assert {case.name: problem for case, problem in problems if problem is not None} == {}
