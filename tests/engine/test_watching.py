"""Steps name their requests while somebody watches, as many as a screen has place for."""

from __future__ import annotations

import pytest

from sfumato.core.messages import Watch
from sfumato.core.plan import Cost, Row, RowKind, RowResult, StepResult, shares_of
from tests.fakes import Harness


def result(*rows: tuple[str, RowKind, int]) -> StepResult:
    return StepResult(
        launch_id=1,
        rows=tuple(
            RowResult(
                row=Row(request_id=request_id, kind=kind, start=0, end=tokens, cost=Cost(tokens=tokens))
            )
            for request_id, kind, tokens in rows
        ),
    )


def test_rows_of_one_request_and_kind_are_counted_together() -> None:
    commit, denoise = RowKind.COMMIT, RowKind.DENOISE
    shares = shares_of(result(("A", commit, 4), ("A", denoise, 4), ("B", denoise, 8), ("B", denoise, 8)), 64)
    assert [(share.request_id, share.kind, share.rows, share.tokens) for share in shares] == [
        ("A", "commit", 1, 4),
        ("A", "denoise", 1, 4),
        ("B", "denoise", 2, 16),
    ]


def test_no_more_shares_than_the_limit() -> None:
    rows = [(name, RowKind.DENOISE, 1) for name in "ABCABC"]
    assert [(share.request_id, share.rows) for share in shares_of(result(*rows), 2)] == [("A", 2), ("B", 2)]


@pytest.mark.parametrize("depth", [0, 1])
def test_only_watched_steps_name_their_requests(depth: int) -> None:
    harness = Harness(depth=depth)
    harness.submit("A", 3)
    harness.submit("B", 5)
    harness.run()
    harness.send(Watch(is_on=True))
    harness.submit("C", 3)
    harness.run()
    harness.send(Watch(is_on=False))
    harness.submit("D", 3)
    harness.run()
    steps = [step for turn in harness.turns for step in turn.steps if step.rows]
    named = [{share.request_id for share in step.shares} for step in steps]
    watched = [names for names in named if names]
    assert watched
    assert all(names == {"C"} for names in watched)
    first = named.index(watched[0])
    assert named == [set()] * first + watched + [set()] * (len(named) - first - len(watched))
    for step in steps[first : first + len(watched)]:
        assert sum(share.tokens for share in step.shares) == step.tokens
