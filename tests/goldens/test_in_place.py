"""Goldens whose keys are read where they lie, whatever few they are."""

from __future__ import annotations

import pytest

from sfumato.models import batch
from tests.goldens.__main__ import replay_each
from tests.goldens.cases import Case
from tests.goldens.replay import Mode
from tests.goldens.test_modes import engine_cases, one_of_each_kind


def check(monkeypatch: pytest.MonkeyPatch, cases: list[Case]) -> None:
    """Replay cases; rows that see keys where they lie must be among them."""
    num_apart, apart = 0, batch._apart

    def counted(*args):  # type: ignore[no-untyped-def]
        nonlocal num_apart
        group = apart(*args)
        num_apart += group is not None
        return group

    monkeypatch.setattr(batch, "_ROW_BYTES", 0)
    monkeypatch.setattr(batch, "_apart", counted)
    problems = {case.name: problem for case, problem in replay_each(cases, Mode())}
    assert {name: problem for name, problem in problems.items() if problem is not None} == {}
    assert num_apart > len(cases)


def test_one_case_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, one_of_each_kind(engine_cases()))


@pytest.mark.slow
def test_all_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, engine_cases())
