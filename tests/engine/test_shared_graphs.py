"""Engines that share weights and replay forwards together, as threads of one process, seen from inside."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import pytest

from sfumato import Engine, EngineConfig, SamplingParams
from sfumato.core.messages import Message, Stop, Submit
from sfumato.engine.build import Loaded, build_loop, load
from sfumato.engine.direct import DirectOutbox
from sfumato.engine.frontend import make_spec
from sfumato.engine.loop import EngineLoop
from sfumato.models.graphs import Graphs
from sfumato.parallel.lockstep import LockstepRunner
from sfumato.parallel.voting import VotedGraphs
from tests.engine.test_shared_weights import prompt_of, shared_ranks
from tests.models.checkpoints import LLADA2, random_weights, write
from tests.parallel.test_voting import listen

# By rank and turn: the prompt, and how many tokens are asked for.
Script = dict[int, tuple[list[int], int]]
SCRIPTS: list[Script] = [
    {0: (prompt_of(2), 40), 12: (prompt_of(5), 9)},
    {3: (prompt_of(60), 4), 9: (list(range(1, 60)), 17)},
    {},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model with experts."""
    return str(write(tmp_path_factory.mktemp("shared") / "model", LLADA2, random_weights(LLADA2)))


def params_of(num_tokens: int) -> SamplingParams:
    """Return what a request asks for."""
    return SamplingParams(seed=num_tokens, max_tokens=num_tokens, ignore_eos=True, temperature=0.7)


class ScriptedInbox:
    """Messages that come in turns of their own number; the last one stops the rank when all others stop."""

    is_called = False

    def __init__(self, messages: dict[int, Message], last: int) -> None:
        self._messages = messages
        self._turn, self._last = -1, last

    def filenos(self) -> tuple[int, ...]:
        """Nobody else adds messages."""
        return ()

    def drain(self, *, wait_seconds: float | None) -> list[Message]:
        """Return the next turn's message."""
        self._turn += 1
        if self._turn == self._last:
            return [Stop(drain=True)]
        return [self._messages[self._turn]] if self._turn in self._messages else []


@dataclass
class Rank:
    """What one rank has done: tokens of each of its requests, kinds of its steps, every collective."""

    tokens: dict[str, list[int]]
    kinds: list[str]
    told: list[tuple[str, tuple[int, ...]]]
    graphs: Graphs | None


def graphs_of(loop: EngineLoop) -> Graphs | None:
    """Return the recordings of a rank's loop."""
    voted = cast(VotedGraphs | None, cast(LockstepRunner, loop.lanes[0].runner)._graphs)
    return None if voted is None else voted._graphs


def lived(config: EngineConfig, loaded: Loaded, most_pages: int | None = None) -> Rank:
    """Serve a rank's script."""
    messages: dict[int, Message] = {
        turn: Submit(
            request_id=f"{config.rank}-{turn}", spec=make_spec(prompt, params_of(number), loaded.traits)
        )
        for turn, (prompt, number) in SCRIPTS[config.rank].items()
    }
    outbox = DirectOutbox()
    loop, _ = build_loop(loaded, ScriptedInbox(messages, 15), outbox)
    graphs = graphs_of(loop)
    if most_pages is not None:
        assert graphs is not None
        graphs._most_pages = most_pages
    assert loaded.shared is not None
    assert loaded.shared.ranks.group is not None
    rank = Rank({}, [], [], graphs)
    listen(loaded.shared.ranks.group, rank.told)
    loop.run()
    # All of them leave in one turn.
    loaded.shared.bell.close()
    for turn in outbox.take():
        rank.kinds += [step.kind for step in turn.steps]
        for output in turn.outputs:
            assert output.error is None
            rank.tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return rank


def serve(checkpoint: str, *, last_pages: int | None = None, **options: str) -> list[Rank]:
    """Let three ranks live."""
    made = EngineConfig(
        model=checkpoint,
        dtype="float32",
        device="cpu",
        num_threads=1,
        rank_timeout=10.0,
        kv_memory=4 << 20,
        **options,
    )
    configs = shared_ranks(made, 3)

    def live(config: EngineConfig) -> Rank:
        return lived(config, load(config), last_pages if config.rank == 1 else None)

    with ThreadPoolExecutor(3) as pool:
        return [future.result(60) for future in [pool.submit(live, config) for config in configs]]


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("last_pages", [None, 4])
def test_ranks_replay_together_and_answer_as_without(
    checkpoint: str, overlap: str, last_pages: int | None
) -> None:
    alone = Engine.load(checkpoint, dtype="float32", device="cpu", kv_memory=4 << 20)
    expected = {
        f"{rank}-{turn}": alone.generate([prompt], params_of(number))[0].token_ids
        for rank, script in enumerate(SCRIPTS)
        for turn, (prompt, number) in script.items()
    }
    ranks = serve(checkpoint, last_pages=last_pages, overlap=overlap, graphs="on")
    assert {key: tokens for rank in ranks for key, tokens in rank.tokens.items()} == expected
    assert ranks[0].told == ranks[1].told == ranks[2].told
    assert ranks[2].kinds == ["idle"] * len(ranks[0].kinds)
    graphs = [rank.graphs for rank in ranks if rank.graphs is not None]
    assert len({(each.num_replays, each.num_recordings) for each in graphs}) == 1
    is_whole = last_pages is None
    assert graphs[0].num_replays > len(ranks[0].kinds) // (2 if is_whole else 4)
    # Without a recording the ranks ask one another how many tokens they have: as often as layers are shared.
    votes, asked = (sum(shape == (size,) for _, shape in ranks[0].told) for size in (5, 1))
    assert votes >= graphs[0].num_replays
    assert asked == 2 * (len(ranks[0].kinds) - graphs[0].num_replays)
    assert (votes > graphs[0].num_replays) != is_whole


def test_nobody_votes_where_nothing_is_recorded(checkpoint: str) -> None:
    ranks = serve(checkpoint, graphs="off")
    assert ranks[0].told == ranks[1].told == ranks[2].told
    assert not any(shape == (5,) for _, shape in ranks[0].told)
    assert all(rank.graphs is None for rank in ranks)
