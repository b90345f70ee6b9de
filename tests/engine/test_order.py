"""The order among requests: fair share, or shortest remaining work first. Block length 4."""

from __future__ import annotations

import itertools

import pytest

from sfumato.engine.limits import Limits
from sfumato.engine.step_times import UNLIMITED, StepTimes
from tests.fakes import Harness, rows

# One block of four tokens fills a step.
ONE_AT_A_TIME = 4


def served(harness: Harness, num_steps: int) -> list[str]:
    """Return who ran in each step, where one runs at a time."""
    found = []
    for _ in range(num_steps):
        (name,) = rows(harness.step())
        found.append(name)
    return found


def test_fair_share_serves_all_in_turn() -> None:
    harness = Harness(limits=Limits(max_step_tokens=ONE_AT_A_TIME))
    harness.submit("long", 2, max_tokens=30, threshold=2.0)
    harness.submit("short", 2, max_tokens=4, threshold=2.0)
    assert served(harness, 4) == ["long", "short", "long", "short"]


def test_shortest_first_ends_the_short_one_before_it_goes_on() -> None:
    harness = Harness(limits=Limits(max_step_tokens=ONE_AT_A_TIME, order="shortest"))
    harness.submit("long", 2, max_tokens=30, threshold=2.0)
    assert served(harness, 3) == ["long"] * 3
    harness.submit("short", 2, max_tokens=4, threshold=2.0)
    names = served(harness, 8)
    assert names == ["short"] * names.count("short") + ["long"] * names.count("long")
    assert "short" in harness.ended


def test_priority_comes_before_length() -> None:
    harness = Harness(limits=Limits(max_step_tokens=ONE_AT_A_TIME, order="shortest"))
    harness.submit("short", 2, max_tokens=8, threshold=2.0)
    harness.submit("long", 2, max_tokens=30, threshold=2.0, priority=1)
    assert served(harness, 3) == ["long"] * 3


def test_shortest_first_admits_the_shortest_first() -> None:
    harness = Harness(limits=Limits(max_running_requests=1, order="shortest"))
    for name, max_tokens in (("long", 30), ("middle", 12), ("short", 4)):
        harness.submit(name, 2, max_tokens=max_tokens, threshold=2.0)
    harness.run()
    assert list(harness.ended) == ["short", "middle", "long"]


def test_a_long_request_runs_now_and_then_however_many_short_ones_come() -> None:
    harness = Harness(limits=Limits(max_step_tokens=ONE_AT_A_TIME, order="shortest"))
    harness.submit("long", 2, max_tokens=30, threshold=2.0)
    names = []
    for number in range(40):
        harness.submit(f"short{number}", 2, max_tokens=4, threshold=2.0)
        names += served(harness, 4)
    steps = [index for index, name in enumerate(names) if name == "long"]
    assert len(steps) >= 3
    assert max(later - earlier for earlier, later in itertools.pairwise([0, *steps, len(names)])) <= 64


def test_prompts_of_short_requests_are_prefilled_first() -> None:
    harness = Harness(limits=Limits(max_prefill_tokens=8, order="shortest"))
    harness.submit("long", 9, max_tokens=30)
    harness.submit("short", 9, max_tokens=4)
    assert rows(harness.step()) == {"short": [("prefill", 0, 8)]}


def test_a_line_is_learnt_from_the_steps() -> None:
    times = StepTimes()
    for _ in range(10):
        for tokens in (16, 64, 256):
            times.note(tokens, 0.030 + 0.001 * tokens)
    # 11.5 x 30: from there on, 92 hundredths of a step's time are spent on its tokens.
    assert times.enough_tokens() == pytest.approx(345, abs=2)


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [(16, 0.1), (32, 0.2)],
        [(16, 0.1)] * 50,
        [(16, 0.1), (64, 0.1)] * 20,
        [(16, 0.2), (64, 0.1)] * 20,
    ],
    ids=["none", "too few", "all alike", "flat", "falling"],
)
def test_what_cannot_be_told_limits_nothing(steps: list[tuple[int, float]]) -> None:
    times = StepTimes()
    for tokens, seconds in steps:
        times.note(tokens, seconds)
    assert times.enough_tokens() == UNLIMITED


def test_it_forgets_a_machine_that_has_changed() -> None:
    times = StepTimes()
    for fixed in (0.001, 0.050):
        for _ in range(300):
            for tokens in (16, 64):
                times.note(tokens, fixed + 0.001 * tokens)
    assert times.enough_tokens() == pytest.approx(575, rel=0.05)
