"""Launches that begin before the outcome of the one before is read (`--overlap device`)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sfumato.core.messages import FinishReason
from sfumato.core.plan import RowKind, StepPlan, StepResult
from sfumato.core.request import Request
from sfumato.core.traits import Visibility
from sfumato.engine.limits import Limits
from sfumato.text.begun import Begun
from sfumato.text.runner import TextRunner
from tests.engine.test_overlap import ALGORITHMS
from tests.fakes import EOS, VOCAB, Harness, TableModel, make_traits, solo

REQUESTS = (("A", 9, 12), ("B", 2, 17), ("C", 5, 4))


class Watched(TextRunner):
    """Notes what begins and what is read, in order."""

    events: list[tuple[str, StepPlan]]

    def begin(self, plan: StepPlan, live: Mapping[str, Request], behind: Begun | None = None) -> Begun:
        self.events.append(("begin", plan))
        return super().begin(plan, live, behind)

    def finish(self, begun: Begun) -> StepResult:
        self.events.append(("read", begun.plan))
        return super().finish(begun)


def watched(harness: Harness) -> list[tuple[str, StepPlan]]:
    """Watch a harness's runner; the plans are those that were really run."""
    (lane,) = harness.loop.lanes
    assert lane._ahead is not None
    runner = lane._ahead._runner
    runner.__class__ = Watched
    runner.events = []
    return runner.events  # type: ignore[no-any-return]


def ahead(**options: object) -> Harness:
    """Return a harness whose launches begin ahead."""
    return Harness(depth=1, is_ahead=True, **options)  # type: ignore[arg-type]


def run_all(harness: Harness, algorithm: str, parameters: dict[str, object]) -> dict[str, object]:
    """Run three requests that arrive one after another; return what came of each."""
    for name, prompt_len, max_tokens in REQUESTS:
        harness.submit(name, prompt_len, max_tokens=max_tokens, algorithm=algorithm, parameters=parameters)
        harness.step()
    harness.run()
    harness.step()
    return {
        name: (harness.tokens[name], out.finish_reason, out.usage.denoise_steps)
        for name, out in sorted(harness.ended.items())
    }


def test_a_launch_begins_before_the_one_before_is_read() -> None:
    harness = ahead()
    events = watched(harness)
    harness.submit("A", 3, max_tokens=9, threshold=2.0)
    harness.run()
    assert len(harness.tokens["A"]) == 9
    numbered = [(what, plan.launch_id) for what, plan in events]
    ahead_of = [first for first, second in pairwise(numbered) if second == ("read", first[1] - 1)]
    assert len(ahead_of) >= len(events) // 4 > 0
    # Each is read once, in order.
    reads = [number for what, number in numbered if what == "read"]
    assert reads == sorted(set(reads))


@pytest.mark.parametrize(
    ("visibility", "algorithm"), [(kind, name) for kind, names in ALGORITHMS.items() for name in names]
)
@pytest.mark.parametrize("policy", ["separate", "mixed"])
def test_37_tokens_and_denoise_steps_are_those_of_depth_0(
    visibility: Visibility, algorithm: str, policy: str
) -> None:
    traits, limits = make_traits(visibility), Limits(policy=policy)
    expected = run_all(Harness(traits=traits, limits=limits), algorithm, {})
    harness = ahead(traits=traits, limits=limits)
    assert run_all(harness, algorithm, {}) == expected
    assert harness.loop.scheduler._pages.pool.num_leased == 0


@pytest.mark.parametrize("visibility", list(Visibility))
def test_a_block_costs_at_most_one_more_forward(visibility: Visibility) -> None:
    plain, harness = (make(traits=make_traits(visibility)) for make in (Harness, ahead))
    for each in (plain, harness):
        each.submit("A", 3, max_tokens=21, threshold=0.5)
        each.run()
        each.step()
    num_blocks = -(-(3 + 21) // 4)
    extra = harness.ended["A"].usage.nfe - plain.ended["A"].usage.nfe
    assert 0 <= extra <= num_blocks
    assert harness.tokens == plain.tokens


def test_a_step_on_a_finished_block_is_its_commit() -> None:
    harness = ahead(model=TableModel(lambda position: (1, 0.99)))
    events = watched(harness)
    harness.submit("A", 4, max_tokens=12)
    harness.run()
    harness.step()
    rows = [(row.kind, row.start) for what, plan in events if what == "begin" for row in plan.rows]
    # Each block is decided at once; the launch behind it has nothing to decide and writes the keys.
    denoise = RowKind.DENOISE
    assert rows == [(RowKind.PREFILL, 0), *((denoise, start) for start in (4, 4, 8, 8, 12, 12))]
    assert harness.ended["A"].usage.denoise_steps == 3
    assert sum(step.wasted_rows for turn in harness.turns for step in turn.steps) == 3


def test_where_the_end_of_a_block_is_waited_for_its_commit_rides_on_the_next_step() -> None:
    # One position a step: the last one is sure to end its block.
    harness = ahead()
    events = watched(harness)
    harness.submit("A", 4, max_tokens=8, threshold=2.0)
    harness.run()
    harness.step()
    kinds = [row.kind for what, plan in events if what == "begin" for row in plan.rows]
    assert kinds.count(RowKind.DENOISE) == harness.ended["A"].usage.denoise_steps == 8
    assert kinds.count(RowKind.COMMIT) == 1


class Restless(TableModel):
    """Wants another token than the one that stands there, wherever one stands."""

    def head(self, hidden: Tensor) -> Tensor:
        """Return f32[M, V]."""
        logits = torch.zeros(len(hidden), VOCAB)
        for row, (token, position) in enumerate(hidden.int().tolist()):
            logits[row, 1 + (token * 7 + position) % 50] = 5.0 + 0.01 * position
        return logits


@pytest.mark.parametrize("threshold", [0.5, 2.0], ids=["all at once", "one by one"])
def test_edits_are_those_of_depth_0(threshold: float) -> None:
    found = []
    for make in (Harness, ahead):
        harness = make(model=Restless())
        parameters = {"threshold": threshold, "max_post_edit_steps": 3}
        harness.submit("A", 4, max_tokens=8, algorithm="joint_threshold", parameters=parameters)
        harness.run()
        harness.step()
        found.append((harness.tokens["A"], harness.ended["A"].usage.denoise_steps))
    assert found[0] == found[1]
    assert found[0][1] > 8


def test_a_known_number_of_steps_wastes_none() -> None:
    plain, harness = (make(traits=make_traits(Visibility.BIDIRECTIONAL)) for make in (Harness, ahead))
    for each in (plain, harness):
        each.submit("A", 4, max_tokens=12, algorithm="llada", parameters={"steps": 6})
        each.run()
        each.step()
    assert harness.ended["A"].usage.nfe == plain.ended["A"].usage.nfe == 6
    assert harness.tokens == plain.tokens


def test_the_end_of_a_request_is_not_run_past() -> None:
    harness = ahead(model=TableModel(lambda position: (EOS if position == 9 else 1, 0.6)))
    harness.submit("A", 4, max_tokens=30, threshold=2.0)
    harness.submit("B", 4, max_tokens=9, threshold=2.0)
    harness.run()
    harness.step()
    assert harness.ended["A"].finish_reason is FinishReason.STOP
    assert harness.tokens["A"] == [1, 1, 1, 1, 1, EOS]
    assert len(harness.tokens["B"]) == 9 or harness.tokens["B"][-1] == EOS


@pytest.mark.parametrize("visibility", list(Visibility))
@pytest.mark.parametrize("how", ["raises", "nan"])
def test_34_a_bad_row_fails_alone(visibility: Visibility, how: str) -> None:
    model = TableModel()
    model.fail_on, model.nan_on = (61, None) if how == "raises" else (None, 61)
    harness = ahead(model=model, traits=make_traits(visibility))
    harness.submit("A", [1, 2, 3, 4, 5], max_tokens=9)
    harness.step()
    harness.submit("bad", [1, 2, 61, 4, 5], max_tokens=9)
    harness.submit("B", [5, 6], max_tokens=9)
    harness.run()
    assert harness.ended["bad"].finish_reason is FinishReason.ERROR
    assert "bad" in (harness.ended["bad"].error or "")
    for name, prompt in (("A", [1, 2, 3, 4, 5]), ("B", [5, 6])):
        assert harness.tokens[name] == solo(harness, lambda h, n=name, p=prompt: h.submit(n, p, max_tokens=9))


@pytest.mark.parametrize("visibility", list(Visibility))
def test_28_three_that_need_most_of_the_pool_all_finish(visibility: Visibility) -> None:
    harness = ahead(num_pages=8, traits=make_traits(visibility))
    for name in "ABC":
        harness.submit(name, 4, max_tokens=14)
    harness.run()
    for name in "ABC":
        assert harness.tokens[name] == solo(harness, lambda h, n=name: h.submit(n, 4, max_tokens=14))


def test_20_an_abort_in_flight_ends_once_and_gives_its_pages_back() -> None:
    for num_steps in range(1, 9):
        harness = ahead()
        for name in "AB":
            harness.submit(name, 9, max_tokens=12, threshold=2.0)
        for _ in range(num_steps):
            harness.step()
        harness.abort("A")
        harness.run()
        harness.step()
        assert harness.ended["A"].finish_reason is FinishReason.ABORT
        assert harness.loop.scheduler._pages.pool.num_leased == 0
        assert harness.tokens["B"] == solo(harness, lambda h: h.submit("B", 9, max_tokens=12, threshold=2.0))
