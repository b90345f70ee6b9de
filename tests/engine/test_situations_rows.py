"""Situations 1 to 13: which rows run. Block length 4; policy `separate` where nothing else is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from sfumato.core.spec import Sampling
from sfumato.core.traits import Visibility
from sfumato.engine.limits import Limits
from sfumato.text.decoding import registry
from sfumato.text.decoding.protocol import Algorithm, Outcome, Statistics, View, parameter
from tests.fakes import COMMIT, DENOISE, MASK, PREFILL, Harness, TableModel, make_traits, rows, solo, steady


def test_01_prompts_of_three_lengths_share_a_prefill_then_a_denoise_forward() -> None:
    harness = Harness()
    for name, length in (("A", 9), ("B", 6), ("C", 2)):
        harness.submit(name, length)
    assert rows(harness.step()) == {"A": [(PREFILL, 0, 8)], "B": [(PREFILL, 0, 4)]}
    open_positions = {name: int(harness.work(name).canvas.undecided[:12].sum()) for name in "ABC"}
    assert open_positions == {"A": 3, "B": 6, "C": 10}
    assert rows(harness.step()) == {"A": [(DENOISE, 8, 12)], "B": [(DENOISE, 4, 8)], "C": [(DENOISE, 0, 4)]}


def test_01_a_prefill_takes_as_many_whole_blocks_as_the_budget_allows() -> None:
    harness = Harness(limits=Limits(max_prefill_tokens=10))
    harness.submit("A", 21)
    harness.submit("B", 9)
    assert rows(harness.step()) == {"A": [(PREFILL, 0, 8)]}
    assert rows(harness.step()) == {"A": [(PREFILL, 8, 16)]}
    assert rows(harness.step()) == {"A": [(PREFILL, 16, 20)], "B": [(PREFILL, 0, 4)]}


def test_02_prefill_runs_apart_from_denoising() -> None:
    harness = Harness()
    harness.submit("C", 2, max_tokens=40)
    harness.step()
    harness.submit("A", 9)
    harness.submit("B", 6)
    assert rows(harness.step()).keys() == {"A", "B"}
    assert rows(harness.step()).keys() == {"A", "B", "C"}


def test_02_mixed_puts_all_three_into_the_first_forward() -> None:
    harness = Harness(limits=Limits(policy="mixed"))
    harness.submit("C", 2, max_tokens=40)
    harness.step()
    harness.submit("A", 9)
    harness.submit("B", 6)
    plan = harness.step()
    assert rows(plan).keys() == {"A", "B", "C"}
    assert plan is not None
    assert plan.kind == "mixed"


@pytest.mark.parametrize("every", [1, 2, 4])
def test_03_a_denoising_request_runs_at_least_every_kth_step(every: int) -> None:
    harness = Harness(limits=Limits(max_prefill_tokens=4, denoise_every=every))
    harness.submit("C", 2, max_tokens=40)
    harness.step()
    harness.submit("L", 41)
    without = 0
    while "L" in harness.loop.live and harness.work("L").standing("L").phase.value == PREFILL:
        without = 0 if "C" in rows(harness.step()) else without + 1
        assert without < every


def test_04_prompts_that_arrive_steadily_do_not_starve_denoising() -> None:
    harness = Harness(limits=Limits(max_prefill_tokens=8, denoise_every=4, max_running_requests=8))
    for step in range(1000):
        if step % 2 == 0:
            harness.submit(f"r{step}", [1 + (step + i) % 50 for i in range(9)], max_tokens=3)
        harness.step()
    kinds = harness.kinds()
    longest = max(len(run) for run in "".join("p" if k == PREFILL else "d" for k in kinds).split("d"))
    assert longest <= 3
    assert kinds.count(DENOISE) >= len(kinds) / 4
    harness.run()
    assert len(harness.ended) == 500


@pytest.mark.parametrize(
    ("length", "prefill", "first"), [(3, None, (0, 4)), (4, (0, 4), (4, 8)), (5, (0, 4), (4, 8))]
)
def test_05_only_whole_blocks_are_prefilled(
    length: int, prefill: tuple[int, int] | None, first: tuple[int, int]
) -> None:
    harness = Harness()
    harness.submit("A", length)
    if prefill is not None:
        assert rows(harness.step()) == {"A": [(PREFILL, *prefill)]}
    plan = harness.step()
    assert rows(plan) == {"A": [(DENOISE, *first)]}
    pinned = harness.work("A").canvas.given[slice(*first)].sum()
    assert int(pinned) == length % 4


def test_05_an_empty_prompt_is_refused_but_allowed_by_infill() -> None:
    harness = Harness()
    harness.submit("A", [])
    harness.step()
    assert "empty" in harness.refusals[0].message
    assert harness.refusals[0].field == "prompt"
    harness.submit("B", [], max_tokens=4, infill=(None, 7, None, None))
    harness.run()
    assert harness.tokens["B"][1] == 7


def test_06_one_token_costs_one_block() -> None:
    harness = Harness()
    harness.submit("A", 3, max_tokens=1)
    harness.run()
    assert len(harness.tokens["A"]) == 1
    assert {row.start for plan in harness.plans for row in plan.rows} == {0}


def test_07_the_row_limit_holds_and_priority_goes_first() -> None:
    harness = Harness(limits=Limits(max_running_requests=2))
    for name in "ABC":
        harness.submit(name, 2, max_tokens=2)
    harness.submit("D", 2, max_tokens=2, priority=1)
    assert rows(harness.step()).keys() == {"D", "A"}
    harness.run()
    first_run = {name: next(i for i, p in enumerate(harness.plans) if name in rows(p)) for name in "ABCD"}
    assert first_run["B"] <= first_run["C"]


def _prefill_rows(harness: Harness, name: str) -> list[tuple[str, int, int]]:
    return [row for plan in harness.plans for row in rows(plan).get(name, []) if row[0] == PREFILL]


def test_08_a_prefix_hit_skips_the_prefill() -> None:
    harness = Harness()
    prompt = list(range(1, 10))
    harness.submit("A", prompt)
    harness.run()
    before = len(harness.plans)
    harness.submit("B", prompt)
    assert rows(harness.step()) == {"B": [(DENOISE, 8, 12)]}
    assert harness.work("B").usage().cached_tokens == 8
    harness.run()
    assert not any(row[0] == PREFILL for plan in harness.plans[before:] for row in rows(plan)["B"])
    assert harness.tokens["A"] == harness.tokens["B"]


def test_08_a_fully_cached_prompt_needs_no_prefill_forward() -> None:
    harness = Harness()
    prompt = list(range(1, 9))
    harness.submit("A", prompt)
    harness.run()
    harness.submit("B", prompt)
    assert rows(harness.step()) == {"B": [(DENOISE, 8, 12)]}
    assert int(harness.work("B").canvas.masks_at_start) == 4


def test_08_a_hit_never_ends_inside_a_block() -> None:
    harness = Harness()
    harness.submit("A", [1, 2, 3, 4, 5, 6, 7, 8])
    harness.run()
    harness.submit("B", [1, 2, 3, 4, 5, 6, 9, 9])
    assert rows(harness.step()) == {"B": [(PREFILL, 4, 8)]}


def test_08_another_block_length_is_no_hit() -> None:
    harness = Harness()
    prompt = list(range(1, 9))
    harness.submit("A", prompt)
    harness.run()
    harness.submit("B", prompt, block_length=8)
    assert rows(harness.step()) == {"B": [(PREFILL, 0, 8)]}


def test_08_open_positions_never_enter_the_tree() -> None:
    harness = Harness()
    harness.submit("A", 5, max_tokens=20)
    for _ in range(3):
        harness.step()
    canvas = harness.work("A").canvas
    shared = harness.loop.scheduler._pages.match("block4", tuple(canvas.token_ids.tolist()), 4)
    assert len(shared) <= canvas.block_start // 4


def test_09_rows_that_are_done_are_absent_from_the_next_forward() -> None:
    harness = Harness(model=TableModel(lambda position: (1 + position, 0.99)))
    harness.submit("A", 2, max_tokens=2, threshold=0.5)
    harness.submit("B", 2, max_tokens=2, threshold=0.5)
    harness.submit("C", 2, max_tokens=2, threshold=2.0)
    assert rows(harness.step()).keys() == {"A", "B", "C"}
    assert rows(harness.step()).keys() == {"C"}
    assert harness.ended.keys() == {"A", "B", "C"}


def test_10_a_block_costs_as_many_forwards_as_steps_and_the_last_needs_no_commit() -> None:
    harness = Harness()
    harness.submit("A", 4, max_tokens=12, threshold=2.0)
    harness.run()
    assert harness.kinds() == [PREFILL] + [DENOISE] * 12
    with_commit = [rows(plan)["A"] for plan in harness.plans if len(plan.rows) > 1]
    assert with_commit == [
        [(COMMIT, 4, 8), (DENOISE, 8, 12)],
        [(COMMIT, 8, 12), (DENOISE, 12, 16)],
    ]


def test_11_different_thresholds_algorithms_and_temperatures_share_a_batch() -> None:
    asks: dict[str, dict[str, Any]] = {
        "A": {"threshold": 0.5},
        "B": {"threshold": 0.95},
        "C": {"algorithm": "fast_dllm", "parameters": {"threshold": 0.88}},
        "D": {"algorithm": "sdar", "parameters": {"remasking_strategy": "sequential"}},
        "E": {"threshold": 0.7, "sampling": Sampling(temperature=0.8, seed=5)},
        "F": {"algorithm": "llada", "parameters": {"remasking": "random"}, "sampling": Sampling(seed=9)},
    }
    harness = Harness()
    for name, ask in asks.items():
        harness.submit(name, 6, max_tokens=11, **ask)
    harness.run()
    assert max(len(plan.request_ids()) for plan in harness.plans) == len(asks)
    for name, ask in asks.items():
        alone = solo(harness, lambda h, n=name, a=ask: h.submit(n, 6, max_tokens=11, **a))
        assert harness.tokens[name] == alone


def test_12_a_threshold_above_one_takes_one_token_per_step() -> None:
    harness = Harness()
    harness.submit("A", 4, max_tokens=4, threshold=1.5)
    harness.run()
    assert harness.ended["A"].usage.denoise_steps == 4


@pytest.mark.parametrize("algorithm", ["low_confidence", "fast_dllm"])
def test_12_the_last_step_of_a_cap_decides_what_is_left(algorithm: str) -> None:
    harness = Harness()
    harness.submit("A", 4, max_tokens=4, algorithm=algorithm, parameters={"threshold": 1.5, "max_steps": 2})
    harness.run()
    assert harness.ended["A"].usage.denoise_steps == 2
    assert len(harness.tokens["A"]) == 4


@dataclass(frozen=True, slots=True)
class Oscillating(Algorithm):
    """Decides everything, then rewrites every editable position in each step until its budget is spent."""

    budget: int = parameter(6, "steps per block", minimum=1)

    is_monotone: ClassVar[bool] = False
    reads_decided: ClassVar[bool] = True

    @staticmethod
    def decide(
        rows: Sequence[Oscillating], view: View, statistics: Statistics, states: Sequence[Any]
    ) -> Outcome:
        tokens = 10 + (view.token_ids + 1) % 2
        spent = [(state or 0) + 1 for state in states]
        done = view.step.new_tensor(
            [used >= row.budget for used, row in zip(spent, rows, strict=True)]
        ).bool()
        # Pinned positions too: that they stay is the canvas's doing, not the algorithm's.
        everything = view.eligible.new_ones(view.eligible.shape)
        return Outcome(transfer=everything, tokens=tokens, done=done, states=spent)


@pytest.mark.parametrize("visibility", list(Visibility))
def test_13_an_oscillating_edit_algorithm_ends_by_its_budget(
    visibility: Visibility, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.ALGORITHMS, "oscillating", "tests.engine.test_situations_rows:Oscillating")
    harness = Harness(traits=make_traits(visibility))
    prompt = [40, 41, 42, 43, 44]
    harness.submit("A", prompt, max_tokens=9, algorithm="oscillating", parameters={"budget": 5})
    harness.step()
    committed: dict[int, int] = {}
    while "A" in harness.loop.live:
        canvas = harness.work("A").canvas
        assert canvas.token_ids[:5].tolist() == prompt
        for position in range(canvas.block_start):
            token = int(canvas.token_ids[position])
            assert committed.setdefault(position, token) == token
        harness.step()
    num_blocks = 3
    assert harness.ended["A"].usage.denoise_steps == 5 * num_blocks
    assert len(harness.tokens["A"]) == 9


def test_steady_table_never_wants_the_mask() -> None:
    assert all(steady(position)[0] < MASK for position in range(200))
