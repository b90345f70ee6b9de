"""Goldens where every page lies apart from the one before, and its keys are read where they lie."""

from __future__ import annotations

import random

import pytest

from sfumato.cache.pool import PageLease, PagePool
from sfumato.models import attention, batch
from tests.goldens.__main__ import replay_each
from tests.goldens.cases import Case
from tests.goldens.replay import Mode
from tests.goldens.test_modes import engine_cases, one_of_each_kind


def check(monkeypatch: pytest.MonkeyPatch, cases: list[Case]) -> None:
    """Replay cases; most calls of attention must have been in pieces."""
    rng, calls = random.Random(0), 0
    sdpa_pieces = attention.sdpa_pieces

    def scattered(pool: PagePool, lease: PageLease, num_pages: int) -> tuple[int, int]:
        return rng.choice([page for page, is_free in enumerate(pool._is_free) if is_free]), 1

    def counted(*args, **options):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        return sdpa_pieces(*args, **options)

    monkeypatch.setattr(PagePool, "_run", scattered)
    monkeypatch.setattr(batch, "_ROW_BYTES", 0)
    monkeypatch.setattr(batch, "_PIECE_BYTES", 0)
    monkeypatch.setattr(attention, "sdpa_pieces", counted)
    problems = {case.name: problem for case, problem in replay_each(cases, Mode())}
    assert {name: problem for name, problem in problems.items() if problem is not None} == {}
    assert calls > 10 * len(cases)


def test_one_case_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, one_of_each_kind(engine_cases()))


@pytest.mark.slow
def test_all_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, engine_cases())
