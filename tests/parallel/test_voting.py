"""Recorded forwards of several ranks: one shape for all, and as many forwards everywhere whatever fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from sfumato.core.plan import Row, RowKind, StepPlan, StepResult
from sfumato.core.request import Request
from sfumato.core.traits import ModelTraits
from sfumato.errors import EngineError
from sfumato.models.batch import Batch, KVStore
from sfumato.models.folder import read_folder
from sfumato.models.graphs import Graphs, Need, RunAgain, common_shape
from sfumato.models.language_model import LanguageModel
from sfumato.models.paged import Shape
from sfumato.models.weights import load_model
from sfumato.parallel.groups import Group
from sfumato.parallel.lockstep import LockstepRunner
from sfumato.parallel.voting import Vote, VotedGraphs, WholeForward, needs_of
from sfumato.text.batching import FedRow
from sfumato.text.paged_batching import batch_of
from tests.models.checkpoints import EVERY, random_weights, write
from tests.parallel.test_meeting import load_part
from tests.parallel.threads import run_ranks

BLOCK, NUM_PAGES = 4, 24
BLOCK_OF, NONE = Need(8, 1, 8), Need(0, 0, 4)
NO = Vote(None, 0)


def yes(need: Need, num_recordings: int = 0) -> Vote:
    """Return a vote for a replay."""
    return Vote(need, num_recordings)


@pytest.mark.parametrize(
    ("votes", "shape"),
    [
        ([yes(BLOCK_OF), yes(BLOCK_OF)], Shape(8, 1, 8)),
        # A rank without rows fills up to what the other needs.
        ([yes(BLOCK_OF), yes(NONE)], Shape(8, 1, 8)),
        ([yes(NONE), yes(NONE)], Shape(8, 2, 4)),
        # Tokens, tiles and queries of a tile: each as many as any rank needs.
        ([yes(Need(24, 3, 8)), yes(Need(5, 1, 8))], Shape(24, 4, 8)),
        ([yes(Need(8, 1, 8)), yes(Need(20, 2, 16))], Shape(24, 3, 16)),
        ([yes(BLOCK_OF), NO], None),
        ([NO, yes(BLOCK_OF), yes(NONE)], None),
        # More than any shape has.
        ([yes(Need(8 * 65, 65, 8)), yes(BLOCK_OF)], None),
        # Somebody's recording has failed.
        ([yes(BLOCK_OF, 3), yes(BLOCK_OF, 2)], None),
    ],
)
def test_the_shape_is_a_function_of_all_votes(votes: list[Vote], shape: Shape | None) -> None:
    for order in (votes, votes[::-1]):
        needs = needs_of([Vote.of(vote.numbers()) for vote in order])
        assert (None if needs is None else common_shape(needs, 8)) == shape


def fed_row(rank: int, turn: int, length: int) -> FedRow:
    """Return a row of random tokens behind a context of one page."""
    tokens = np.random.default_rng([rank, turn]).integers(0, 60, length)
    end = BLOCK + length
    row = Row(request_id="a", kind=RowKind.DENOISE, start=BLOCK, end=end, slot=BLOCK, visible=end)
    return FedRow(row, tokens, range(rank, rank + 1 + length // BLOCK), BLOCK)


def filled_store(model: LanguageModel) -> KVStore:
    """Return a store with seeded keys and values."""
    store = KVStore.allocate(
        shapes=model.kv_shapes, num_slots=NUM_PAGES * BLOCK, dtype=torch.float32, device="cpu"
    )
    generator = torch.Generator().manual_seed(7)
    for layer in (*store.keys, *store.values):
        layer.copy_(torch.randn(layer.shape, generator=generator))
    return store


def batch_for(fed: FedRow, traits: ModelTraits, store: KVStore, graphs: VotedGraphs | None) -> Batch:
    """Return the batch of one row; of its tokens all but the first are wanted."""
    return batch_of(
        [fed],
        traits=traits,
        output_tokens=np.arange(1, fed.length),
        store=store,
        page_size=BLOCK,
        device=torch.device("cpu"),
        graphs=graphs,
    )


class Rank:
    """One rank's model and recordings; its text runner lays one row out and makes one forward.

    told: every collective that it has taken part in. fail: called in front of the layout, behind it and in
    the second layer, with the turn's number and that place.
    """

    def __init__(self, path: Path, group: Group) -> None:
        self.index = group.rank
        self.traits = read_folder(str(path)).traits
        self.told: list[tuple[str, tuple[int, ...]]] = []
        listen(group, self.told)
        self.model, self.ranks = load_part(path, group)
        self.model.get_submodule("layers.1.mlp_norm").register_forward_pre_hook(
            lambda *_: self.fail(self.turn, "forward")
        )
        self.store = filled_store(self.model)
        whole = WholeForward(self.model, self.ranks)
        self.graphs = Graphs(
            whole,
            self.store,
            RunAgain,
            page_size=BLOCK,
            unit=8,
            most_pages=64,
            device=torch.device("cpu"),
        )
        self.voted = VotedGraphs(self.model, self.ranks, self.graphs, whole)
        self.runner = LockstepRunner(self, self.model, self.ranks, lambda error: error, self.voted)
        self.turn = 0
        self.hidden: list[Tensor | None] = []
        self.errors: list[str | None] = []
        self.fail: Callable[[int, str], None] = lambda turn, place: None

    def play(self, lengths: list[int]) -> Rank:
        """Make a turn with one row of each length; 0: with none."""
        for self.turn, length in enumerate(lengths):
            rows = (Row(request_id="a", kind=RowKind.DENOISE, start=0, end=length, slot=0),) if length else ()
            plan = StepPlan(launch_id=self.turn, rows=rows, is_idle_forward=not rows)
            votes = self.ranks.exchange((int(self.voted.may_replay(plan)),))
            self.hidden.append(None)
            self.errors.append(None)
            self.runner.launch(replace(plan, by_graph=all(vote for (vote,) in votes)), {})
        return self

    def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult:
        """Run; what raises fails the request alone."""
        try:
            self.fail(self.turn, "layout")
            fed = fed_row(self.index, self.turn, plan.rows[0].end)
            batch = batch_for(fed, self.traits, self.store, self.voted)
            self.fail(self.turn, "batch")
            self.hidden[-1] = self.voted.hidden(batch)
        except EngineError:
            raise
        except Exception as error:
            self.errors[-1] = str(error)
        return StepResult(launch_id=plan.launch_id, rows=())


def listen(group: Group, told: list[tuple[str, tuple[int, ...]]]) -> None:
    """Note every collective of a group."""
    gather, total = group.all_gather, group.sum_

    def all_gather(x: Tensor) -> list[Tensor]:
        told.append(("gather", tuple(x.shape)))
        return gather(x)

    def sum_(x: Tensor) -> Tensor:
        told.append(("sum", tuple(x.shape)))
        return total(x)

    group.all_gather, group.sum_ = all_gather, sum_  # type: ignore[method-assign]


@pytest.fixture(scope="module", params=["llada2", "sdar_moe", "dream"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts in some layers, in all but one, and without any."""
    config = EVERY[request.param]
    return write(tmp_path_factory.mktemp("voting") / request.param, config, random_weights(config))


def played(
    path: Path, lengths: list[list[int]], arrange: Callable[[Rank], None] = lambda rank: None
) -> list[Rank]:
    """Play all ranks' turns; each has what one rank alone would have, and all took part in the same."""

    def act(group: Group) -> Rank:
        rank = Rank(path, group)
        arrange(rank)
        return rank.play(lengths[group.rank])

    ranks = run_ranks(len(lengths), act)
    alone = load_model(read_folder(str(path)), dtype=torch.float32, device="cpu")
    for rank in ranks:
        assert rank.told == ranks[0].told
        for turn, length in enumerate(lengths[rank.index]):
            found = rank.hidden[turn]
            assert (found is not None) == (length > 0 and rank.errors[turn] is None)
            if found is not None:
                fed = fed_row(rank.index, turn, length)
                with torch.inference_mode():
                    expected = alone.hidden(batch_for(fed, rank.traits, filled_store(alone), None))
                torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    return ranks


def num_replays(ranks: list[Rank]) -> list[int]:
    """Return how many forwards each rank has replayed."""
    return [rank.graphs.num_replays for rank in ranks]


def test_unlike_rows_are_replayed_together(path: Path) -> None:
    ranks = played(path, [[8, 8, 0, 24, 8], [24, 8, 8, 8, 0], [0, 20, 8, 0, 0]])
    assert num_replays(ranks) == [5, 5, 5]
    assert len({rank.graphs.num_recordings for rank in ranks}) == 1
    # Nobody asks how many tokens the others have: a vote of five numbers, and one for the turn.
    assert {shape for kind, shape in ranks[0].told if kind == "gather" and len(shape) == 1} == {(1,), (5,)}
    assert sum(shape == (1,) for _, shape in ranks[0].told) == 5


def test_a_rank_that_cannot_replay_keeps_all_from_it(path: Path) -> None:
    def arrange(rank: Rank) -> None:
        if rank.index == 1:
            rank.graphs._most_pages = 3

    # Its second row has more pages.
    ranks = played(path, [[8, 8, 8, 8], [8, 20, 8, 0]], arrange)
    assert num_replays(ranks) == [3, 3]


@pytest.mark.parametrize("num_runs", [0, 1, 2])
def test_a_recording_that_fails_on_one_rank_is_the_last(path: Path, num_runs: int) -> None:
    def record(forward: Callable[[], Tensor]) -> RunAgain:
        for _ in range(num_runs):
            forward()
        raise RuntimeError("operation not permitted when stream is capturing")

    def arrange(rank: Rank) -> None:
        if rank.index == 1:
            rank.graphs._record = record

    ranks = played(path, [[8, 8, 8], [8, 16, 0]], arrange)
    assert num_replays(ranks) == [1, 0]
    assert [rank.graphs.failure is None for rank in ranks] == [True, False]


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
@pytest.mark.parametrize("place", ["layout", "batch", "forward"])
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("lengths", [[[8, 8, 8, 8], [8, 8, 16, 8]], [[0, 0, 8, 8], [8, 8, 8, 0]]])
def test_what_fails_on_one_rank_leaves_the_others_theirs(
    path: Path, kind: type[Exception], place: str, turn: int, lengths: list[list[int]]
) -> None:
    def arrange(rank: Rank) -> None:
        def fail(now: int, where: str) -> None:
            if rank.index == 1 and (now, where) == (turn, place):
                raise kind("something is wrong on this rank")

        rank.fail = fail

    ranks = played(path, lengths, arrange)
    assert [error is not None for error in ranks[1].errors] == [now == turn for now in range(4)]
    assert not any(ranks[0].errors)
    if place != "forward" or turn == 1:
        assert num_replays(ranks) == [4, 4]
    else:
        # What the other rank has recorded then, this one has not.
        assert num_replays(ranks) == [1, 0]


def test_a_device_is_not_waited_for_for_ever(path: Path) -> None:
    def act(group: Group) -> int:
        rank, looks = Rank(path, group), iter([False, False, True])
        rank.ranks.wait_for(lambda: next(looks))
        with pytest.raises(EngineError, match=r"a replayed forward is not done after 0\.5 s"):
            rank.ranks.wait_for(lambda: False)
        return len(list(looks))

    assert run_ranks(2, act, seconds=0.5) == [0, 0]


def test_a_lost_rank_is_told_at_once(path: Path) -> None:
    def act(group: Group) -> str:
        rank = Rank(path, group)
        if group.rank == 1:
            return ""
        with pytest.raises(EngineError) as caught:
            rank.runner.launch(StepPlan(launch_id=0, is_idle_forward=True, by_graph=True), {})
        return str(caught.value)

    assert "lost the others" in run_ranks(2, act, seconds=1.0)[0]
