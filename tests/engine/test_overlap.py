"""Overlap: step i + 1 is launched before the outcome of step i is known (situations 20, 22, 34, 35, 37)."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest

from sfumato.core.messages import Abort, FinishReason
from sfumato.core.plan import StepPlan, StepResult
from sfumato.core.request import Request
from sfumato.core.traits import Visibility
from sfumato.engine.limits import Limits
from tests.fakes import EOS, Harness, TableModel, make_traits, solo

ALGORITHMS = {
    Visibility.BLOCK_CAUSAL: ["low_confidence", "sdar", "joint_threshold", "dinfer", "fast_dllm", "llada"],
    Visibility.BIDIRECTIONAL: ["llada", "fast_dllm", "d3llm", "dream", "entropy_threshold", "dinfer"],
}


class GatedRunner:
    """Lets a launch run when the test says so, and tells which have begun."""

    def __init__(self, inner: object) -> None:
        self._inner = inner
        self.gate = threading.Semaphore(0)
        self.begun: list[int] = []

    def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult:
        """Wait for the gate."""
        self.begun.append(plan.launch_id)
        assert self.gate.acquire(timeout=20)
        result: StepResult = self._inner.launch(plan, live)  # type: ignore[attr-defined]
        return result


def gated(harness: Harness) -> GatedRunner:
    """Put a gate in front of a harness's runner."""
    (lane,) = harness.loop.lanes
    lane.runner = runner = GatedRunner(lane.runner)
    return runner


def test_the_next_step_is_launched_while_one_runs() -> None:
    harness = Harness(depth=1)
    runner = gated(harness)
    harness.submit("A", 3, max_tokens=9, threshold=2.0)
    harness.loop.turn()
    request = harness.loop.live["A"]
    # The first launch cannot have ended, and the turn is over: nothing waited for it.
    assert len(request.in_flight) == 1
    assert not harness.tokens
    runner.gate.release()
    harness.loop.turn()
    # The second one was launched on a guess; only then the first was waited for.
    assert len(request.in_flight) == 1
    assert request.usage.nfe == 1
    runner.gate.release(100)
    harness.run()
    assert len(harness.tokens["A"]) == 9


@pytest.mark.parametrize(
    ("visibility", "algorithm"), [(kind, name) for kind, names in ALGORITHMS.items() for name in names]
)
@pytest.mark.parametrize("policy", ["separate", "mixed"])
def test_37_depth_1_gives_the_tokens_and_forwards_of_depth_0(
    visibility: Visibility, algorithm: str, policy: str
) -> None:
    found = []
    for depth in (0, 1):
        harness = Harness(traits=make_traits(visibility), limits=Limits(policy=policy), depth=depth)
        for name, prompt_len, max_tokens in (("A", 9, 12), ("B", 2, 17), ("C", 5, 4)):
            harness.submit(name, prompt_len, max_tokens=max_tokens, algorithm=algorithm, parameters={})
            harness.step()
        harness.run()
        ends = {name: (out.finish_reason, out.usage) for name, out in sorted(harness.ended.items())}
        found.append((harness.tokens, ends))
    assert found[0] == found[1]


def test_nothing_is_run_for_a_request_whose_end_was_not_known_yet() -> None:
    harness = Harness(model=TableModel(lambda position: (EOS if position == 5 else 1, 0.99)), depth=1)
    harness.submit("A", 4, max_tokens=30)
    harness.run()
    harness.step()
    steps = [step for turn in harness.turns for step in turn.steps]
    # Prefill, then one step that decides the block; the launch behind it had nothing left to do.
    assert harness.ended["A"].usage.nfe == 2
    assert sum(step.wasted_rows for step in steps) <= 1
    assert len(harness.plans) == 2


@pytest.mark.parametrize("num_steps", range(1, 9))
def test_20_an_abort_in_flight_ends_once_and_gives_its_pages_back_later(num_steps: int) -> None:
    harness = Harness(depth=1)
    runner = gated(harness)
    for _ in range(num_steps - 1):
        runner.gate.release()
    harness.submit("A", 9, max_tokens=12, threshold=2.0)
    harness.submit("B", 9, max_tokens=12, threshold=2.0)
    for _ in range(num_steps):
        harness.step()
    request = harness.loop.live["A"]
    assert request.in_flight
    harness.loop.accept(Abort(request_id="A"))
    # Its launch may still write to them.
    assert request.lease is not None
    runner.gate.release(100)
    harness.run()
    harness.step()
    assert harness.ended["A"].finish_reason is FinishReason.ABORT
    assert request.lease is None
    assert harness.loop.scheduler._pages.pool.num_leased == 0
    assert harness.tokens["B"] == solo(harness, lambda h: h.submit("B", 9, max_tokens=12, threshold=2.0))


def test_22_a_late_result_never_reaches_a_new_request_of_that_id() -> None:
    harness = Harness(depth=1)
    runner = gated(harness)
    harness.submit("A", [1, 2, 3], max_tokens=30, threshold=2.0)
    harness.loop.turn()
    harness.abort("A")
    harness.submit("A", [4, 5, 6, 7, 8], max_tokens=6, threshold=2.0)
    runner.gate.release(100)
    for _ in range(40):
        harness.loop.turn()
    outputs = [output for turn in harness.outbox.take() for output in turn.outputs]
    ends = [output.finish_reason for output in outputs if output.finish_reason is not None]
    assert ends == [FinishReason.ABORT, FinishReason.LENGTH]
    first_end = next(index for index, output in enumerate(outputs) if output.finish_reason)
    tokens = [token for output in outputs[first_end + 1 :] for token in output.token_ids]
    alone = solo(harness, lambda h: h.submit("A", [4, 5, 6, 7, 8], max_tokens=6, threshold=2.0))
    assert tokens == alone


@pytest.mark.parametrize("visibility", list(Visibility))
@pytest.mark.parametrize("how", ["raises", "nan"])
def test_34_a_bad_row_fails_alone(visibility: Visibility, how: str) -> None:
    model = TableModel()
    model.fail_on, model.nan_on = (61, None) if how == "raises" else (None, 61)
    harness = Harness(model=model, traits=make_traits(visibility), depth=1)
    harness.submit("A", [1, 2, 3, 4, 5], max_tokens=9)
    harness.submit("bad", [1, 2, 61, 4, 5], max_tokens=9)
    harness.submit("B", [5, 6], max_tokens=9)
    harness.run()
    assert harness.ended["bad"].finish_reason is FinishReason.ERROR
    assert "bad" in (harness.ended["bad"].error or "")
    for name, prompt in (("A", [1, 2, 3, 4, 5]), ("B", [5, 6])):
        assert harness.tokens[name] == solo(harness, lambda h, n=name, p=prompt: h.submit(n, p, max_tokens=9))


def test_a_higher_priority_gets_in_although_all_are_in_flight() -> None:
    harness = Harness(limits=Limits(max_running_requests=2), depth=1)
    for name in ("low", "middle"):
        harness.submit(name, 2, max_tokens=60, threshold=2.0, priority=int(name == "middle"))
    for _ in range(3):
        harness.step()
    harness.submit("high", 2, max_tokens=4, priority=2)
    harness.run()
    assert next(iter(harness.ended)) == "high"
    assert harness.loop.scheduler.num_retractions == 1
    alone = solo(harness, lambda h: h.submit("low", 2, max_tokens=60, threshold=2.0))
    assert harness.tokens["low"] == alone


def test_28_three_that_need_most_of_the_pool_all_finish() -> None:
    harness = Harness(num_pages=8, depth=1)
    for name in "ABC":
        harness.submit(name, 4, max_tokens=14)
    harness.run()
    for name in "ABC":
        assert harness.tokens[name] == solo(harness, lambda h, n=name: h.submit(n, 4, max_tokens=14))


@pytest.mark.parametrize("drain", [True, False])
def test_35_a_shutdown_waits_for_what_is_in_flight(drain: bool) -> None:
    harness = Harness(depth=1)
    for name in "ABC":
        harness.submit(name, 5, max_tokens=9)
    harness.step()
    harness.stop(drain=drain)
    while harness.loop.is_alive:
        harness.step()
    wanted = FinishReason.LENGTH if drain else FinishReason.ABORT
    assert {out.finish_reason for out in harness.ended.values()} == {wanted}
    assert len(harness.ended) == 3
    assert harness.loop.scheduler._pages.pool.num_leased == 0
    (lane,) = harness.loop.lanes
    assert lane._worker is None


def test_host_work_is_hidden_behind_forwards() -> None:
    harness = Harness(depth=1)
    harness.submit("A", 4, max_tokens=40, threshold=2.0)
    harness.run()
    steps = [step for turn in harness.turns for step in turn.steps]
    assert all(0.0 <= step.hidden_seconds <= step.host_seconds for step in steps)
    assert any(step.hidden_seconds > 0.0 for step in steps)
