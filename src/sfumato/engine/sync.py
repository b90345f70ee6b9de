"""Agreement on a turn's forward between ranks that share weights; an engine that is alone runs its plan.

After planning, each rank contributes one small row of numbers; all see the same rows, and `decide` is a pure
function of them: the table "Data parallel with shared weights" of docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from msgspec.structs import replace

from sfumato.core.plan import StepPlan
from sfumato.errors import EngineError


class Alone:
    """No peers: the plan stands, and nobody else has to be asked."""

    is_shared = False
    may_wait = True
    may_leave = True

    def agree(self, plan: StepPlan, *, num_arrived: int = 0, is_leaving: bool = False) -> StepPlan:
        """Return the plan unchanged."""
        return plan


class Holds(IntEnum):
    """What rows a rank has for this turn."""

    NOTHING = 0
    PREFILL = 1
    DENOISE = 2
    MIXED = 3


class Action(IntEnum):
    """What a rank does in this turn: nothing, a forward without rows of its own, or its rows."""

    NOTHING = 0
    IDLE_FORWARD = 1
    RUN = 2


@dataclass(frozen=True, slots=True)
class Contribution:
    """One rank's row.

    num_arrived: requests that came with their keys and values since the turn before: they need no forward,
    but each an answer. votes_for_graph: it can replay a recorded forward, or record one. is_leaving: it was
    stopped and is done.
    """

    holds: Holds = Holds.NOTHING
    num_tokens: int = 0
    num_arrived: int = 0
    votes_for_graph: bool = False
    is_leaving: bool = False

    def numbers(self) -> tuple[int, ...]:
        """Return the row as it is sent."""
        return (
            int(self.holds),
            self.num_tokens,
            self.num_arrived,
            int(self.votes_for_graph),
            int(self.is_leaving),
        )

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Contribution:
        """Return the row that was sent."""
        holds, num_tokens, num_arrived, votes_for_graph, is_leaving = numbers
        return cls(Holds(holds), num_tokens, num_arrived, bool(votes_for_graph), bool(is_leaving))


@dataclass(frozen=True, slots=True)
class Agreement:
    """What every rank does in this turn.

    returns_arrivals: each rank's, whatever runs. by_graph: a recorded forward is replayed, everywhere, if one
    shape takes the rows of all.
    is_idle: nobody had anything, so that everybody may sleep. may_leave: nobody will ever have anything.
    """

    actions: tuple[Action, ...]
    returns_arrivals: tuple[bool, ...]
    by_graph: bool
    is_idle: bool
    may_leave: bool


def decide(contributions: Sequence[Contribution]) -> Agreement:
    """Return what the ranks do, in rank order."""
    runs = [each.holds is not Holds.NOTHING for each in contributions]
    others = Action.IDLE_FORWARD if any(runs) else Action.NOTHING
    arrivals = tuple(each.num_arrived > 0 for each in contributions)
    return Agreement(
        actions=tuple(Action.RUN if has_rows else others for has_rows in runs),
        returns_arrivals=arrivals,
        by_graph=any(each.holds is Holds.DENOISE for each in contributions)
        and all(each.votes_for_graph for each in contributions),
        is_idle=not any(runs) and not any(arrivals),
        may_leave=all(each.is_leaving for each in contributions),
    )


def holds_of(plan: StepPlan) -> Holds:
    """Return what rows a plan has."""
    return Holds[plan.kind.upper()] if plan.rows else Holds.NOTHING


class Exchange(Protocol):
    """One small all-gather between the ranks."""

    def __call__(self, numbers: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return every rank's numbers, in rank order. Raises EngineError where a rank is lost."""
        ...


class Waker(Protocol):
    """Wakes the other ranks; number: agreements that this rank has entered."""

    number: int

    def ring(self) -> None: ...

    def explain(self, error: EngineError) -> EngineError: ...


class Peers:
    """Agrees with the other ranks once a turn; every rank makes the same turns.

    votes: whether this rank can replay a recorded forward with a plan's rows, or with none.
    may_wait: the ranks agreed that all of them are idle, so that this one may sleep until something comes or
    another rank rings. may_leave: they agreed that none of them has anything left to do.
    """

    is_shared = True

    def __init__(
        self,
        rank: int,
        exchange: Exchange,
        bell: Waker,
        votes: Callable[[StepPlan], bool] = lambda plan: False,
    ) -> None:
        self.may_wait = False
        self.may_leave = False
        self.latest: Agreement | None = None
        self._rank = rank
        self._exchange = exchange
        self._bell = bell
        self._votes = votes

    def agree(self, plan: StepPlan, *, num_arrived: int = 0, is_leaving: bool = False) -> StepPlan:
        """Return what this rank runs: its plan, a forward without rows for its peers' sake, or nothing.

        Raises EngineError where a rank is lost.
        """
        contribution = Contribution(
            holds=holds_of(plan),
            num_tokens=sum(row.cost.tokens for row in plan.rows),
            num_arrived=num_arrived,
            votes_for_graph=self._votes(plan),
            is_leaving=is_leaving,
        )
        agreement = self.exchange(contribution)
        if agreement.actions[self._rank] is Action.IDLE_FORWARD:
            return StepPlan(launch_id=plan.launch_id, is_idle_forward=True, by_graph=agreement.by_graph)
        return replace(plan, by_graph=True) if agreement.by_graph else plan

    def exchange(self, contribution: Contribution) -> Agreement:
        """Contribute one row and return what all ranks agree on."""
        self._bell.number += 1
        if self.may_wait:
            # The others may be asleep since the turn before.
            self._bell.ring()
        try:
            rows = self._exchange(contribution.numbers())
        except EngineError as error:
            raise self._bell.explain(error) from error
        self.latest = decide([Contribution.of(row) for row in rows])
        self.may_wait, self.may_leave = self.latest.is_idle, self.latest.may_leave
        return self.latest
