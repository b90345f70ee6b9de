"""Goldens on two ranks: a case of each kind in the fast set, all of them in the slow one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.goldens.__main__ import PLANS, read_supported, replay_each
from tests.goldens.cases import Case, find_cases
from tests.goldens.replay import end_ranks
from tests.goldens.test_goldens import DATA


@pytest.fixture(autouse=True)
def _no_rank_is_left() -> Iterator[None]:
    yield
    end_ranks()


def engine_cases() -> list[Case]:
    """Return every case that is a request, those of one checkpoint together."""
    kinds = {kind for _, kinds, _ in read_supported() for kind in kinds} & PLANS.keys()
    cases = [
        case for family in {family for family, _, _ in read_supported()} for case in find_cases(DATA / family)
    ]
    return sorted(
        (case for case in cases if case.kind in kinds), key=lambda case: (case.checkpoint, case.name)
    )


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


def failures(cases: list[Case]) -> list[str]:
    """Replay cases on two ranks and return what went wrong."""
    assert cases
    return [f"{case.name}: {problem}" for case, problem in replay_each(cases, 2) if problem is not None]


def test_a_case_of_each_kind_on_two_ranks() -> None:
    cases = one_of_each_kind(engine_cases())
    assert len(cases) > 20
    assert failures(cases) == []


@pytest.mark.slow
def test_all_cases_on_two_ranks() -> None:
    assert failures(engine_cases()) == []
