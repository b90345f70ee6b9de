"""Situations 14 to 23: masks, and how requests end."""

from __future__ import annotations

import pytest

from sfumato.core.messages import FinishReason
from sfumato.core.traits import Visibility
from sfumato.engine.frontend import Assembler
from sfumato.engine.limits import Limits
from sfumato.text.tokenizer import StopStrings
from tests.fakes import EOS, MASK, Harness, TableModel, make_traits, rows, solo


def test_14_the_mask_id_as_prompt_text_stays_as_it_is() -> None:
    harness = Harness()
    prompt = [1, MASK, 3, MASK, 5, MASK]
    harness.submit("A", prompt, max_tokens=6)
    harness.step()
    while "A" in harness.loop.live:
        canvas = harness.work("A").canvas
        assert canvas.token_ids[:6].tolist() == prompt
        assert not canvas.undecided[:6].any()
        harness.step()
    assert harness.ended["A"].finish_reason is FinishReason.LENGTH
    assert len(harness.tokens["A"]) == 6


def test_15_a_predicted_mask_id_is_never_a_decision_also_after_a_retraction() -> None:
    model = TableModel(lambda position: (MASK, 0.9))
    harness = Harness(model=model, limits=Limits(max_running_requests=1))
    harness.submit("A", 5, max_tokens=8)
    harness.step()
    harness.step()
    harness.submit("B", 5, max_tokens=2, priority=1)
    harness.run()
    assert MASK not in harness.tokens["A"]
    assert len(harness.tokens["A"]) == 8
    assert harness.loop.scheduler.num_retractions == 1


@pytest.mark.parametrize("visibility", list(Visibility))
def test_16_infill_pins_never_change(visibility: Visibility) -> None:
    harness = Harness(traits=make_traits(visibility))
    infill = (30, None, None, None, 31, 32, None, None, None, None, None, 33)
    harness.submit("A", [1, 2], max_tokens=len(infill), infill=infill)
    harness.step()
    while "A" in harness.loop.live:
        canvas = harness.work("A").canvas
        for offset, token in enumerate(infill):
            if token is not None:
                assert canvas.token_ids[2 + offset] == token
        harness.step()
    tokens = harness.tokens["A"]
    assert [token for token, pin in zip(tokens, infill, strict=True) if pin is not None] == [30, 31, 32, 33]


def test_17_eos_inside_a_block_ends_the_output_there() -> None:
    model = TableModel(lambda position: (EOS if position == 5 else 1 + position, 0.99))
    harness = Harness(model=model)
    harness.submit("A", 4, max_tokens=12, threshold=0.5)
    harness.run()
    assert harness.tokens["A"] == [5, EOS]
    assert harness.ended["A"].finish_reason is FinishReason.STOP
    assert harness.ended["A"].usage.completion_tokens == 2
    # The prompt's block is cached, the block with the end token is not.
    assert harness.loop.scheduler._pages.pool.num_cached == 1


def test_17_eos_behind_an_open_position_waits_for_it() -> None:
    model = TableModel(
        lambda position: (EOS if position == 5 else 1 + position, 0.99 if position == 5 else 0.6)
    )
    harness = Harness(model=model)
    harness.submit("A", 4, max_tokens=12, threshold=0.9)
    harness.step()
    harness.step()
    assert "A" in harness.loop.live
    harness.run()
    assert harness.tokens["A"] == [5, EOS]


class Letters:
    """A tokenizer whose token n is the n-th small letter."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids if token < 26)


def test_18_a_stop_string_may_cross_blocks_and_is_held_back() -> None:
    stops = StopStrings(["defg"])
    assert stops.push("abcd") == ("abc", False)
    assert stops.push("ef") == ("", False)
    assert stops.push("ghi") == ("", True)
    stops = StopStrings(["defg"])
    assert stops.push("abcde") == ("abc", False)
    assert stops.push("xy") == ("dexy", False)
    assert stops.push("zd", is_last=True) == ("zd", False)


def test_18_the_engine_text_ends_in_front_of_the_stop_string() -> None:
    model = TableModel(lambda position: (position % 26, 0.99))
    harness = Harness(model=model)
    harness.submit("A", 4, max_tokens=20, threshold=0.5)
    assembler = Assembler(Letters(), stop=("hij",))  # type: ignore[arg-type]
    text, is_met = "", False
    while not is_met:
        harness.step()
        for output in harness.outputs:
            delta = assembler.push(output)
            text += delta.text
            is_met = is_met or delta.met_stop_string
        harness.outputs.clear()
    harness.abort("A")
    harness.step()
    assert text == "efg"
    assert harness.ended["A"].finish_reason is FinishReason.ABORT


def test_19_max_tokens_cuts_the_last_block() -> None:
    harness = Harness()
    harness.submit("A", 8, max_tokens=5)
    harness.run()
    assert len(harness.tokens["A"]) == 5
    assert harness.ended["A"].finish_reason is FinishReason.LENGTH
    assert {row.start for plan in harness.plans for row in plan.rows} == {0, 8, 12}


def test_19_eos_on_the_last_allowed_token_is_a_stop() -> None:
    harness = Harness(model=TableModel(lambda position: (EOS if position == 8 else 1 + position, 0.99)))
    harness.submit("A", 4, max_tokens=5, threshold=0.5)
    harness.run()
    assert harness.ended["A"].finish_reason is FinishReason.STOP
    assert len(harness.tokens["A"]) == 5


@pytest.mark.parametrize("visibility", list(Visibility))
def test_19_beyond_the_context(visibility: Visibility) -> None:
    harness = Harness(traits=make_traits(visibility, context_length=16))
    harness.submit("full", 16, max_tokens=4)
    harness.submit("tail", 12, max_tokens=40)
    harness.run()
    assert harness.refusals[0].request_id == "full"
    assert "context of 16" in harness.refusals[0].message
    assert len(harness.tokens["tail"]) == 4
    assert harness.ended["tail"].finish_reason is FinishReason.LENGTH


def _aborted_in_phase(when: str) -> Harness:
    harness = Harness(limits=Limits(max_prefill_tokens=4, max_running_requests=2))
    harness.submit("other", 6, max_tokens=10)
    if when == "waiting":
        harness.submit("more", 6, max_tokens=10)
    harness.submit("A", 13, max_tokens=12)
    if when == "queue":
        harness.abort("A")
        return harness
    steps = {"waiting": 2, "prefilling": 2, "denoising": 8, "finished": 60, "between": 9}
    for _ in range(steps.get(when, 2)):
        harness.step()
    if when == "unknown":
        harness.abort("nobody")
    harness.abort("A")
    return harness


@pytest.mark.parametrize(
    "when", ["queue", "waiting", "prefilling", "denoising", "between", "finished", "unknown"]
)
def test_20_abort_in_each_state_gives_one_terminal_message(when: str) -> None:
    harness = _aborted_in_phase(when)
    harness.run()
    assert "nobody" not in harness.ended
    assert harness.ended["A"].finish_reason is (
        FinishReason.LENGTH if when == "finished" else FinishReason.ABORT
    )
    assert harness.tokens["other"] == solo(harness, lambda h: h.submit("other", 6, max_tokens=10))
    assert harness.loop.scheduler._pages.pool.num_leased == 0


def test_20_abort_of_a_request_that_was_not_chosen_this_step() -> None:
    harness = Harness(limits=Limits(max_step_tokens=4))
    harness.submit("A", 2, max_tokens=30)
    harness.submit("B", 2, max_tokens=30)
    plan = harness.step()
    (chosen,) = rows(plan)
    other = "B" if chosen == "A" else "A"
    harness.abort(other)
    harness.run()
    assert harness.ended[other].finish_reason is FinishReason.ABORT
    assert harness.ended[chosen].finish_reason is FinishReason.LENGTH


def test_21_ids_are_whole_and_unique_while_active() -> None:
    harness = Harness()
    harness.submit("req-1", 3, max_tokens=8)
    harness.submit("req-10", 3, max_tokens=8)
    harness.step()
    harness.submit("req-10", 3, max_tokens=2)
    harness.abort("req-1")
    harness.run()
    assert [refusal.request_id for refusal in harness.refusals] == ["req-10"]
    assert harness.ended["req-1"].finish_reason is FinishReason.ABORT
    assert harness.ended["req-10"].finish_reason is FinishReason.LENGTH
    assert len(harness.tokens["req-10"]) == 8
    del harness.ended["req-10"]
    harness.submit("req-10", 3, max_tokens=2)
    harness.run()
    assert harness.ended["req-10"].usage.completion_tokens == 2


def test_22_abort_and_finish_in_the_same_step_end_once() -> None:
    harness = Harness()
    harness.submit("A", 3, max_tokens=1)
    harness.abort("A")
    harness.submit("B", 3, max_tokens=1)
    harness.run()
    harness.abort("B")
    harness.step()
    assert harness.ended["A"].finish_reason is FinishReason.ABORT
    assert harness.ended["B"].finish_reason is FinishReason.LENGTH
    assert harness.loop.num_ended == 2


def test_22_a_slot_is_reused_at_once_after_an_abort() -> None:
    harness = Harness(limits=Limits(max_running_requests=1), num_pages=8)
    harness.submit("A", 6, max_tokens=20)
    harness.step()
    harness.step()
    harness.abort("A")
    harness.submit("B", 6, max_tokens=20)
    harness.run()
    assert harness.tokens["B"] == solo(harness, lambda h: h.submit("B", 6, max_tokens=20))


def test_23_a_deadline_ends_with_timeout() -> None:
    harness = Harness(limits=Limits(max_running_requests=1))
    harness.submit("A", 3, max_tokens=40, timeout=10.0)
    harness.submit("B", 3, max_tokens=4, timeout=5.0)
    harness.step()
    harness.clock.advance(6.0)
    harness.step()
    assert harness.ended["B"].finish_reason is FinishReason.TIMEOUT
    harness.clock.advance(6.0)
    harness.step()
    assert harness.ended["A"].finish_reason is FinishReason.TIMEOUT
