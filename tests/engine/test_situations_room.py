"""Situations 24 to 36: running out, nothing is lost, an idle loop."""

from __future__ import annotations

import random
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfumato.cache.pool import PagePool
from sfumato.core.messages import FinishReason, Message, Pause, Ping, Resume, Stop, Submit
from sfumato.core.spec import Decoding, TextSpec
from sfumato.core.traits import Visibility
from sfumato.engine.limits import Limits
from sfumato.errors import EngineError
from tests.fakes import DENOISE, PREFILL, Harness, TableModel, make_traits, rows, solo


def test_24_what_can_never_fit_is_refused_with_the_limit() -> None:
    harness = Harness(num_pages=4, limits=Limits(max_logits_bytes=64 * 4 * 4))
    harness.submit("pages", 12, max_tokens=8)
    harness.submit("logits", 4, max_tokens=8, block_length=8)
    harness.submit("context", 300, max_tokens=8)
    harness.step()
    messages = {refusal.request_id: refusal.message for refusal in harness.refusals}
    assert "has 4" in messages["pages"]
    assert str(64 * 4 * 4) in messages["logits"]
    assert "256" in messages["context"]
    assert not harness.loop.live


def test_25_denoising_goes_on_while_a_prefill_waits_for_a_row() -> None:
    harness = Harness(limits=Limits(max_running_requests=2))
    harness.submit("A", 2, max_tokens=6)
    harness.submit("B", 2, max_tokens=30)
    harness.submit("C", 9, max_tokens=4)
    while "A" in harness.loop.live or not harness.plans:
        assert rows(harness.step()).keys() <= {"A", "B"}
    assert rows(harness.step()) == {"C": [(PREFILL, 0, 8)]}


def test_26_a_refused_prefill_changes_nothing_and_denoising_goes_on() -> None:
    harness = Harness(num_pages=8)
    harness.submit("A", 5, max_tokens=12)
    for _ in range(2):
        harness.step()
    harness.submit("big", 25, max_tokens=4)
    plan = harness.step()
    assert rows(plan).keys() == {"A"}
    request = harness.loop.live["big"]
    assert request.lease is None
    assert request.status.value == "waiting"
    harness.run()
    assert harness.ended["big"].finish_reason is FinishReason.LENGTH


def test_27_without_a_free_page_only_rows_that_need_none_run() -> None:
    harness = Harness(num_pages=4)
    harness.submit("A", 4, max_tokens=8)
    harness.submit("B", 3, max_tokens=13)
    harness.submit("C", 2, max_tokens=4)
    harness.submit("D", 6, max_tokens=2)
    harness.step()
    plan = harness.step()
    assert "D" not in rows(plan)
    assert harness.loop.live["D"].lease is None
    while "C" in harness.loop.live:
        assert harness.step() is not None
    harness.run()
    assert len(harness.ended) == 4


def test_28_three_requests_that_need_more_than_half_the_pool_all_finish() -> None:
    harness = Harness(num_pages=10)
    for name in "ABC":
        harness.submit(name, 5, max_tokens=19)
    harness.run()
    for name in "ABC":
        assert harness.tokens[name] == solo(harness, lambda h, n=name: h.submit(n, 5, max_tokens=19))
    assert harness.loop.scheduler.num_retractions <= 3


def test_29_a_retraction_in_the_middle_of_a_block_resumes_there() -> None:
    harness = Harness(limits=Limits(max_running_requests=1))
    harness.submit("A", 6, max_tokens=18)
    while harness.work("A").canvas.block_start < 12 if "A" in harness.loop.live else True:
        harness.step()
    harness.step()
    decided = harness.work("A").canvas.token_ids.copy()
    harness.submit("B", 5, max_tokens=2, priority=1)
    harness.step()
    request = harness.loop.live["A"]
    assert request.lease is None
    assert (harness.work("A").canvas.token_ids == decided).all()
    harness.run()
    assert harness.loop.scheduler.num_retractions == 1
    assert harness.tokens["A"] == solo(harness, lambda h: h.submit("A", 6, max_tokens=18))
    resumed = [row for plan in harness.plans for row in rows(plan).get("A", [])]
    assert (DENOISE, 12, 16) in resumed


def _random_operation(harness: Harness, rng: random.Random, counter: list[int]) -> None:
    action = rng.random()
    if action < 0.35:
        counter[0] += 1
        shared = rng.choice([[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]])
        prompt = shared + [rng.randrange(1, 50) for _ in range(rng.randrange(1, 12))]
        harness.submit(
            f"r{counter[0]}",
            prompt,
            max_tokens=rng.randrange(1, 20),
            threshold=rng.choice([0.3, 0.88, 2.0]),
            priority=rng.choice([0, 0, 0, 1, 2]),
            timeout=rng.choice([None, None, 3.0]),
        )
    elif action < 0.42 and harness.loop.live:
        harness.abort(rng.choice(list(harness.loop.live)))
    elif action < 0.45:
        harness.model.nan_on = rng.choice([None, 7])
    elif action < 0.5:
        harness.clock.advance(1.0)
    else:
        harness.step()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("policy", ["separate", "mixed"])
def test_30_ten_thousand_random_operations_keep_every_page_and_request(policy: str, depth: int) -> None:
    rng = random.Random(30)
    harness = Harness(
        num_pages=24,
        limits=Limits(max_running_requests=6, policy=policy, max_prefill_tokens=8),
        depth=depth,
    )
    counter = [0]
    for _ in range(5000):
        _random_operation(harness, rng, counter)
    harness.model.nan_on = None
    harness.run()
    assert harness.loop.num_accepted == harness.loop.num_ended
    reasons = {output.finish_reason for output in harness.ended.values()}
    assert reasons >= {FinishReason.LENGTH, FinishReason.ABORT, FinishReason.TIMEOUT, FinishReason.ERROR}
    assert harness.loop.scheduler.num_retractions > 0


def test_30_a_double_free_raises() -> None:
    pool = PagePool(4, 4)
    lease = pool.lease("A")
    pool.extend(lease, 2)
    pool.release(lease)
    with pytest.raises(EngineError, match="double free"):
        pool.release(lease)


def test_31_a_budget_of_logits_bytes_limits_the_rows() -> None:
    harness = Harness(limits=Limits(max_logits_bytes=2 * 4 * 64 * 4))
    for name in "ABCDE":
        harness.submit(name, 4, max_tokens=4, threshold=2.0)
    harness.step()
    for _ in range(30):
        plan = harness.step()
        if plan is not None and plan.kind == DENOISE:
            assert sum(row.cost.logits_bytes for row in plan.rows) <= 2 * 4 * 64 * 4
    harness.run()
    assert len(harness.ended) == 5


def test_32_a_higher_priority_pushes_out_the_lowest() -> None:
    harness = Harness(limits=Limits(max_running_requests=2))
    harness.submit("low", 2, max_tokens=30)
    harness.submit("middle", 2, max_tokens=30, priority=1)
    harness.step()
    harness.submit("high", 2, max_tokens=4, priority=2)
    assert rows(harness.step()).keys() == {"middle", "high"}
    harness.run()
    assert harness.tokens["low"] == solo(harness, lambda h: h.submit("low", 2, max_tokens=30))


def test_32_who_has_waited_too_long_is_not_pushed_out_again() -> None:
    harness = Harness(limits=Limits(max_running_requests=1, max_wait_seconds=10.0))
    harness.submit("first", 2, max_tokens=30, priority=1)
    harness.submit("low", 2, max_tokens=30)
    harness.step()
    harness.clock.advance(20.0)
    for step in range(200):
        harness.submit(f"high{step}", 2, max_tokens=8, priority=1)
        harness.step()
        harness.clock.advance(1.0)
    assert "low" in harness.ended


def test_33_the_live_requests_are_always_accepted_minus_ended() -> None:
    rng = random.Random(33)
    harness = Harness(num_pages=16, limits=Limits(max_running_requests=3))
    names: set[str] = set()
    for index in range(60):
        name = f"r{index}"
        harness.submit(name, rng.randrange(1, 12), max_tokens=rng.randrange(1, 12))
        names.add(name)
        harness.step()
        assert harness.loop.live.keys() | harness.ended.keys() == names
    harness.run()
    assert harness.ended.keys() == names


@pytest.mark.parametrize("visibility", list(Visibility))
@pytest.mark.parametrize("how", ["raises", "nan"])
def test_34_a_bad_row_fails_alone(visibility: Visibility, how: str) -> None:
    model = TableModel()
    model.fail_on, model.nan_on = (61, None) if how == "raises" else (None, 61)
    harness = Harness(model=model, traits=make_traits(visibility))
    harness.submit("A", [1, 2, 3, 4, 5], max_tokens=9)
    harness.submit("bad", [1, 2, 61, 4, 5], max_tokens=9)
    harness.submit("B", [5, 6], max_tokens=9)
    harness.run()
    assert harness.ended["bad"].finish_reason is FinishReason.ERROR
    assert "bad" in (harness.ended["bad"].error or "")
    for name, prompt in (("A", [1, 2, 3, 4, 5]), ("B", [5, 6])):
        assert harness.tokens[name] == solo(harness, lambda h, n=name, p=prompt: h.submit(n, p, max_tokens=9))


def test_35_a_pause_keeps_every_request() -> None:
    harness = Harness()
    harness.submit("A", 5, max_tokens=9)
    harness.step()
    harness.send(Pause())
    harness.submit("B", 5, max_tokens=9)
    for _ in range(5):
        assert harness.step() is None
    assert harness.loop.live.keys() == {"A", "B"}
    harness.send(Resume())
    harness.run()
    assert harness.tokens["A"] == solo(harness, lambda h: h.submit("A", 5, max_tokens=9))


@pytest.mark.parametrize("drain", [True, False])
def test_35_a_shutdown_drains_or_ends_each_request_once(drain: bool) -> None:
    harness = Harness()
    for name in "ABC":
        harness.submit(name, 5, max_tokens=9)
    harness.step()
    harness.stop(drain=drain)
    harness.submit("late", 5, max_tokens=9)
    while harness.loop.is_alive:
        harness.step()
    wanted = FinishReason.LENGTH if drain else FinishReason.ABORT
    assert {name: output.finish_reason for name, output in harness.ended.items()} == dict.fromkeys(
        "ABC", wanted
    )
    assert [refusal.request_id for refusal in harness.refusals] == ["late"]
    assert harness.turns[-1].stopped


class BlockingInbox:
    """Counts how often it is asked; waits on a condition like the real one."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.condition = threading.Condition()
        self.num_calls = 0

    def put(self, message: Message) -> None:
        with self.condition:
            self.messages.append(message)
            self.condition.notify()

    def drain(self, *, wait_seconds: float | None) -> list[Message]:
        self.num_calls += 1
        with self.condition:
            if not self.messages and wait_seconds != 0.0:
                self.condition.wait(wait_seconds)
            messages, self.messages = self.messages, []
        return messages


def test_36_an_idle_loop_blocks_and_wakes_on_a_message() -> None:
    harness = Harness()
    inbox = BlockingInbox()
    harness.loop.inbox = inbox
    thread = threading.Thread(target=harness.loop.run)
    thread.start()
    time.sleep(0.2)
    assert inbox.num_calls <= 2
    spec = TextSpec(
        prompt_ids=(1, 2, 3), max_tokens=5, block_length=4, decoding=Decoding(algorithm="low_confidence")
    )
    inbox.put(Submit(request_id="A", spec=spec))
    inbox.put(Ping(token=7))
    deadline = time.monotonic() + 20
    while harness.loop.num_ended == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    calls = inbox.num_calls
    time.sleep(0.2)
    assert inbox.num_calls <= calls + 1
    inbox.put(Stop(drain=True))
    thread.join(20)
    assert not thread.is_alive()
    turns = harness.outbox.take()
    assert any(7 in turn.pongs for turn in turns)
    assert sum(len(output.token_ids) for turn in turns for output in turn.outputs) == 5


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    asks=st.lists(
        st.tuples(
            st.integers(1, 14),
            st.integers(1, 14),
            st.sampled_from([0.3, 0.88, 2.0]),
            st.integers(0, 2),
            st.integers(0, 9),
        ),
        min_size=2,
        max_size=6,
    ),
    num_pages=st.integers(8, 20),
    policy=st.sampled_from(["separate", "mixed"]),
    order=st.sampled_from(["fair", "shortest"]),
    depth=st.sampled_from([0, 1]),
)
def test_laws_1_to_4_hold_for_random_histories(
    asks: list[tuple[int, int, float, int, int]], num_pages: int, policy: str, order: str, depth: int
) -> None:
    limits = Limits(max_running_requests=3, policy=policy, order=order)
    harness = Harness(num_pages=num_pages, limits=limits, depth=depth)

    def submit(target: Harness, index: int) -> None:
        prompt_len, max_tokens, threshold, priority, _ = asks[index]
        target.submit(f"r{index}", prompt_len, max_tokens=max_tokens, threshold=threshold, priority=priority)

    for step in range(10):
        for index, ask in enumerate(asks):
            if ask[4] == step:
                submit(harness, index)
        harness.step()
    harness.run()
    for index in range(len(asks)):
        assert harness.tokens[f"r{index}"] == solo(harness, lambda h, i=index: submit(h, i))
