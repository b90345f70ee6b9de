"""Agreement between ranks: the table of the architecture row by row, as a function and between processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from sfumato.core.plan import Cost, Row, RowKind, StepPlan
from sfumato.engine.sync import Action, Alone, Contribution, Holds, Peers, decide, holds_of
from sfumato.errors import EngineError
from sfumato.parallel.groups import Rendezvous

NOTHING, ARRIVED = Contribution(), Contribution(num_arrived=1)
DENOISE, PREFILL = Contribution(Holds.DENOISE, 8), Contribution(Holds.PREFILL, 32)
READY = Contribution(Holds.DENOISE, 8, votes_for_graph=True)
READY_PREFILL = Contribution(Holds.PREFILL, 8, votes_for_graph=True)
READY_IDLE = Contribution(votes_for_graph=True)
RUN, IDLE, NO = Action.RUN, Action.IDLE_FORWARD, Action.NOTHING


@dataclass(frozen=True)
class Expected:
    """One line of the table: what each rank does, which arrivals are answered, whether by graph."""

    holds: tuple[Contribution, ...]
    actions: tuple[Action, ...]
    returned: tuple[bool, ...]
    by_graph: bool = False
    is_idle: bool = False


TABLE = {
    "denoise + nothing": Expected((DENOISE, NOTHING), (RUN, IDLE), (False, False)),
    "denoise + nothing, both ready": Expected(
        (READY, READY_IDLE), (RUN, IDLE), (False, False), by_graph=True
    ),
    "denoise + arrived": Expected((DENOISE, ARRIVED), (RUN, IDLE), (False, True)),
    "arrived + nothing": Expected((ARRIVED, NOTHING), (NO, NO), (True, False)),
    "denoise + nothing + arrived": Expected(
        (DENOISE, NOTHING, ARRIVED), (RUN, IDLE, IDLE), (False, False, True)
    ),
    "arrived + arrived": Expected((ARRIVED, ARRIVED), (NO, NO), (True, True)),
    "prefill + nothing": Expected((PREFILL, READY_IDLE), (RUN, IDLE), (False, False)),
    "prefill + arrived": Expected((PREFILL, ARRIVED), (RUN, IDLE), (False, True)),
    "denoise + prefill": Expected((READY, PREFILL), (RUN, RUN), (False, False)),
    "denoise + prefill, both ready": Expected(
        (READY, READY_PREFILL), (RUN, RUN), (False, False), by_graph=True
    ),
    "denoise + denoise": Expected((READY, DENOISE), (RUN, RUN), (False, False)),
    "denoise + denoise, both ready": Expected((READY, READY), (RUN, RUN), (False, False), by_graph=True),
    "nothing + nothing": Expected((NOTHING, NOTHING), (NO, NO), (False, False), is_idle=True),
    "nothing + nothing + nothing": Expected((NOTHING,) * 3, (NO,) * 3, (False,) * 3, is_idle=True),
    "prefill + nothing + denoise": Expected((PREFILL, NOTHING, DENOISE), (RUN, IDLE, RUN), (False,) * 3),
    "its own arrival beside rows": Expected(
        (Contribution(Holds.DENOISE, 4, num_arrived=2), NOTHING), (RUN, IDLE), (True, False)
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name: str) -> None:
    line = TABLE[name]
    agreement = decide(line.holds)
    assert agreement.actions == line.actions
    assert agreement.returns_arrivals == line.returned
    assert (agreement.by_graph, agreement.is_idle) == (line.by_graph, line.is_idle)
    assert not agreement.may_leave
    # Which rank holds what makes no difference.
    turned = decide(line.holds[::-1])
    assert turned.actions == line.actions[::-1]
    assert turned.returns_arrivals == line.returned[::-1]


def test_nobody_leaves_before_all_are_done() -> None:
    done = Contribution(is_leaving=True)
    assert not decide((done, DENOISE)).may_leave
    assert not decide((done, NOTHING)).may_leave
    assert decide((done, done, done)).may_leave


def test_a_row_of_numbers_is_the_contribution() -> None:
    for line in TABLE.values():
        for each in line.holds:
            assert Contribution.of(each.numbers()) == each
    rows = {
        kind: Row(request_id="a", kind=kind, start=0, end=4, cost=Cost(tokens=4))
        for kind in (RowKind.PREFILL, RowKind.DENOISE, RowKind.COMMIT, RowKind.SCORE)
    }
    assert holds_of(StepPlan(launch_id=1)) is Holds.NOTHING
    assert holds_of(StepPlan(launch_id=1, rows=(rows[RowKind.PREFILL],))) is Holds.PREFILL
    assert (
        holds_of(StepPlan(launch_id=1, rows=(rows[RowKind.COMMIT], rows[RowKind.DENOISE]))) is Holds.DENOISE
    )
    assert holds_of(StepPlan(launch_id=1, rows=(rows[RowKind.PREFILL], rows[RowKind.SCORE]))) is Holds.MIXED


class Bellboy:
    """Counts rings."""

    def __init__(self) -> None:
        self.number = 0
        self.rings: list[int] = []

    def ring(self) -> None:
        """Note which agreement it was for."""
        self.rings.append(self.number)

    def explain(self, error: EngineError) -> EngineError:
        """Know nothing more."""
        return error


def peers(
    others: Sequence[Contribution], votes: Callable[[StepPlan], bool] = lambda plan: False
) -> tuple[Peers, Bellboy, list[Contribution]]:
    """Return rank 0 of as many ranks as contribute one thing after another."""
    bell, sent = Bellboy(), []
    waiting = list(others)

    def exchange(numbers: tuple[int, ...]) -> list[tuple[int, ...]]:
        sent.append(Contribution.of(numbers))
        return [numbers, waiting.pop(0).numbers()]

    return Peers(0, exchange, bell, votes), bell, sent


def test_a_rank_rings_only_when_the_others_may_sleep() -> None:
    sync, bell, sent = peers([NOTHING, NOTHING, DENOISE, ARRIVED, NOTHING, NOTHING])
    empty = StepPlan(launch_id=7)
    assert not sync.may_wait
    assert sync.agree(empty) == empty
    assert sync.may_wait
    assert bell.rings == []
    assert not sync.agree(empty).forward
    assert bell.rings == [2]
    idle = sync.agree(empty)
    assert (idle.forward, idle.rows, idle.launch_id, idle.kind) == (True, (), 7, "idle")
    assert bell.rings == [2, 3]
    assert not sync.may_wait
    assert not sync.agree(empty).forward
    # An arrival was answered: the rank that has it may have rows in the next turn.
    assert not sync.may_wait
    own = StepPlan(
        launch_id=8, rows=(Row(request_id="a", kind=RowKind.DENOISE, start=0, end=4, cost=Cost(tokens=4)),)
    )
    assert sync.agree(own, num_arrived=3) == own
    assert sent[-1] == Contribution(Holds.DENOISE, 4, num_arrived=3)
    assert bell.rings == [2, 3]
    sync.agree(empty, is_leaving=True)
    assert sent[-1].is_leaving
    assert not sync.may_leave


def test_a_rank_runs_by_graph_where_all_have_voted_for_it() -> None:
    row = Row(request_id="a", kind=RowKind.DENOISE, start=0, end=4, cost=Cost(tokens=4))
    empty, own = StepPlan(launch_id=1), StepPlan(launch_id=2, rows=(row,))
    sync, _, sent = peers(
        [READY, READY, DENOISE, READY_IDLE, NOTHING], votes=lambda plan: plan.rows != (row, row)
    )
    assert sync.agree(empty).by_graph
    assert sync.agree(own).by_graph
    assert not sync.agree(own).by_graph
    assert not sync.agree(StepPlan(launch_id=3, rows=(row, row))).by_graph
    assert sync.agree(own) == own
    assert [each.votes_for_graph for each in sent] == [True, True, True, False, True]


def test_alone_asks_nobody() -> None:
    plan = StepPlan(launch_id=1)
    assert Alone().agree(plan, is_leaving=True) is plan
    assert Alone().may_wait
    assert Alone().may_leave


class RankProcess:
    """A process that contributes what it is told and tells what was agreed."""

    def __init__(self, stack: ExitStack, address: str, rank: int, size: int) -> None:
        self._process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "tests.engine.agreeing", address, str(rank), str(size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(self._process.kill)

    def contribute(self, contribution: Contribution) -> None:
        """Let it enter the next agreement."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(contribution.numbers()) + "\n")
        self._process.stdin.flush()

    def agreed(self) -> list[object]:
        """Return its own action and whether its arrival is answered, then what all do."""
        assert self._process.stdout is not None
        found: list[object] = json.loads(self._process.stdout.readline())
        return found


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[list[RankProcess]]:
    """Real processes with real groups."""
    rendezvous = Rendezvous.host()
    with ExitStack() as stack:
        yield [RankProcess(stack, rendezvous.address, rank, request.param) for rank in range(request.param)]


def test_the_table_between_processes(ranks: list[RankProcess]) -> None:
    lines = [line for line in TABLE.values() if len(line.holds) == len(ranks)]
    if len(ranks) == 3:
        # Two of the ranks as in the table, the third with nothing.
        for line in [line for line in TABLE.values() if len(line.holds) == 2 and not line.by_graph]:
            third = IDLE if RUN in line.actions else NO
            lines.append(
                Expected(
                    (*line.holds, NOTHING),
                    (*line.actions, third),
                    (*line.returned, False),
                    is_idle=line.is_idle,
                )
            )
    assert len(lines) > 10
    for line in lines:
        for rank, contribution in zip(ranks, line.holds, strict=True):
            rank.contribute(contribution)
        for index, rank in enumerate(ranks):
            action, is_returned, by_graph, is_idle = rank.agreed()
            assert (action, is_returned) == (line.actions[index], line.returned[index])
            assert (by_graph, is_idle) == (line.by_graph, line.is_idle)
