"""Goldens in every mode: one case of each kind always, all of them with the slow tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.goldens.__main__ import PLANS, read_supported, replay_each, replay_together
from tests.goldens.cases import Case, find_cases
from tests.goldens.replay import Mode

DATA = Path(__file__).resolve().parent.parent / "data" / "goldens"
MODES = {
    "overlap": Mode(overlap=True),
    "replicas": Mode(num_replicas=2),
    "replicas and overlap": Mode(num_replicas=2, overlap=True),
}


def all_cases() -> list[Case]:
    """Return the cases that go through an engine."""
    families = sorted({family for family, _, _ in read_supported()})
    return [case for family in families for case in find_cases(DATA / family) if case.kind in PLANS]


def one_of_each_kind() -> Iterator[Case]:
    """Yield the first case of each kind of each family."""
    seen = set()
    for case in all_cases():
        if (case.folder.name, case.kind) not in seen:
            seen.add((case.folder.name, case.kind))
            yield case


@pytest.mark.parametrize("mode", MODES)
def test_one_case_of_each_kind(mode: str) -> None:
    cases = list(one_of_each_kind())
    assert len({case.kind for case in cases}) > 20
    problems = {case.name: problem for case, problem in replay_each(cases, MODES[mode])}
    assert {name: problem for name, problem in problems.items() if problem is not None} == {}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_all_cases(mode: str) -> None:
    cases = all_cases()
    problems = [*replay_each(cases, MODES[mode]), *replay_together(cases, 11, MODES[mode])]
    assert {case.name: problem for case, problem in problems if problem is not None} == {}
