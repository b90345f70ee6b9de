"""Recorded forwards of ranks that share weights: all record together, and all replay together.

What ranks exchange inside a recording is of a fixed size: in each shared layer every rank enters with the
tokens of one shape, to which all fill up. Before a forward that may be replayed each rank says what its rows
need, and a pure function of that is the shape; a rank without rows replays it with none. One that cannot
replay says so there, and then nobody does. Whatever fails on a rank, it makes as many forwards as the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfumato.core.plan import StepPlan
from sfumato.errors import EngineError
from sfumato.models.batch import Batch
from sfumato.models.graphs import Graphs, Need
from sfumato.models.language_model import LanguageModel
from sfumato.models.paged import Numbers, PagedRow, Shape
from sfumato.parallel.meeting import MeetingRanks

_NO_ROWS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Vote:
    """What a rank says before a forward.

    need: of its rows; None: it cannot replay them. num_recordings: that it has.
    """

    need: Need | None
    num_recordings: int

    def numbers(self) -> tuple[int, ...]:
        """Return the vote as it is sent."""
        need = self.need
        sizes = (0, 0, 0) if need is None else (need.num_tokens, need.num_tiles, need.tile)
        return (int(need is not None), *sizes, self.num_recordings)

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Vote:
        """Return the vote that was sent."""
        can_replay, num_tokens, num_tiles, tile, num_recordings = numbers
        return cls(Need(num_tokens, num_tiles, tile) if can_replay else None, num_recordings)


def needs_of(votes: Sequence[Vote]) -> list[Need] | None:
    """Return what all ranks' rows need; None where one cannot replay.

    Ranks have recorded the same shapes, one after another. Where one has not, its recording failed: nothing
    is replayed any more, and it will vote so in the next turn.
    """
    needs = [vote.need for vote in votes if vote.need is not None]
    are_alike = len({vote.num_recordings for vote in votes}) == 1
    return needs if are_alike and len(needs) == len(votes) else None


class WholeForward:
    """A model's forward in which all shared layers are met once, also where it raises on this rank.

    num_runs: how many there were, without those that were only captured.
    """

    def __init__(self, model: LanguageModel, ranks: MeetingRanks) -> None:
        self.num_runs = 0
        self._model = model
        self._ranks = ranks

    def __call__(self, batch: Batch) -> Tensor:
        """Return the hidden states of a batch whose number of tokens all ranks have."""
        is_captured = batch.token_ids.is_cuda and torch.cuda.is_current_stream_capturing()
        self.num_runs += not is_captured
        self._ranks.num_met = 0
        with self._ranks.filled_up(len(batch.token_ids)):
            try:
                return self._model.hidden(batch)
            except EngineError:
                raise
            except Exception:
                if not is_captured:
                    self._model.take_no_part(self._ranks.num_met)
                raise

    def without_rows(self, num_tokens: int) -> None:
        """Meet the other ranks in a forward of so many tokens each, with none."""
        self.num_runs += 1
        with self._ranks.filled_up(num_tokens):
            self._model.take_no_part()


class VotedGraphs:
    """The recorded forwards of one of several ranks, as its runner uses them.

    model: for forwards that are not replayed. graphs: records `whole`.
    """

    def __init__(
        self, model: LanguageModel, ranks: MeetingRanks, graphs: Graphs, whole: WholeForward
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._graphs = graphs
        self._whole = whole
        # Of the present launch: the others wait for a vote; a shape was agreed on and is not replayed yet.
        self._is_open = False
        self._due: Shape | None = None
        self._is_by_graph = False

    def may_replay(self, plan: StepPlan) -> bool:
        """Whether a plan's rows are likely to fit; what they come to is said when the launch begins."""
        num_tokens = sum(row.end - row.start for row in plan.rows)
        has_slots = all(row.slot is not None for row in plan.rows)
        return self._graphs.failure is None and has_slots and num_tokens <= self._graphs.most_tokens

    def open(self, *, by_graph: bool) -> None:
        """Begin a launch. by_graph: every rank will vote before its forward."""
        self._is_open, self._due, self._is_by_graph = by_graph, None, False

    def shape_of(self, rows: Sequence[PagedRow]) -> Shape | None:
        """Return the shape that all ranks fill up to, with these rows here; None where none is replayed."""
        return self._vote(self._graphs.need_of(rows)) if self._is_open else None

    def batch(self, shape: Shape, numbers: Numbers) -> Batch:
        """Place a batch's numbers and return it."""
        return self._graphs.batch(shape, numbers)

    def hidden(self, batch: Batch) -> Tensor:
        """Return hidden states [P, width]: by replay where all ranks have agreed on a shape."""
        if self._is_open:
            # Its rows have become a batch without any shape.
            self._vote(None)
        if batch.shape is None:
            return self._model.hidden(batch)
        self._due = None
        return self._replayed(batch, batch.shape)

    def finish(self) -> bool:
        """Make what the others wait for in a launch that is replayed; return whether it is."""
        if self._is_open:
            self._vote(self._graphs.need_of([]))
        if self._due is not None:
            self.hidden(self.batch(self._due, self._due.numbers([], _NO_ROWS)))
        return self._is_by_graph

    def _vote(self, need: Need | None) -> Shape | None:
        """Return the shape that all agree on; every rank is here once in a launch that was opened."""
        self._is_open = False
        mine = Vote(need, self._graphs.num_recordings)
        needs = needs_of([Vote.of(numbers) for numbers in self._ranks.exchange(mine.numbers())])
        self._due = None if needs is None else self._graphs.shape_for(needs)
        self._is_by_graph = self._due is not None
        return self._due

    def _replayed(self, batch: Batch, shape: Shape) -> Tensor:
        """Replay, recording first where that is new; then as many forwards have been made as elsewhere."""
        num_due = self._whole.num_runs + self._graphs.runs_for(shape)
        num_replays = self._graphs.num_replays

        def make_up() -> None:
            # A replay is the last of them.
            if self._graphs.num_replays == num_replays:
                for _ in range(num_due - self._whole.num_runs):
                    self._whole.without_rows(shape.num_tokens)

        try:
            hidden = self._graphs.hidden(batch)
        except EngineError:
            raise
        except Exception:
            make_up()
            raise
        make_up()
        if hidden.is_cuda:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            self._ranks.wait_for(done.query)
        return hidden
