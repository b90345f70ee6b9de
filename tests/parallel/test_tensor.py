"""A leader and its followers: commands in order, an error that all of them meet, a leader that is misused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.errors import EngineError
from sfumato.models.language_model import LanguageModel
from sfumato.parallel.groups import Group
from sfumato.parallel.tensor import Leader, follow
from tests.models.checkpoints import EVERY, random_weights, write
from tests.parallel.test_meeting import batch_of
from tests.parallel.test_split import load_part
from tests.parallel.threads import run_ranks


class NoChildren:
    """Followers that somebody else has started."""

    def death_soon(self) -> None:
        """Know of none."""

    def end(self) -> None:
        """Have nobody to wait for."""

    def kill(self) -> None:
        """Have nobody to kill."""


class Fragile:
    """Makes a forward fail in the middle, on every rank, while it is told to."""

    def __init__(self, model: LanguageModel) -> None:
        self.is_broken = False
        model.get_submodule("layers.1.attention_norm").register_forward_pre_hook(self._fail)

    def _fail(self, *_: object) -> None:
        if self.is_broken:
            raise ValueError("a bad row")


def test_followers_survive_an_error_that_the_leader_meets_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EVERY["sdar_moe"]
    path = write(tmp_path / "model", config, random_weights(config))
    batch = batch_of(0, 12, False)

    def act(group: Group) -> list[Tensor] | None:
        model = load_part(path, group)
        fragile = Fragile(model)

        def forward(order: bytes) -> None:
            fragile.is_broken = order == b"broken"
            model.hidden(batch)

        if group.rank == 1:
            follow(model, group, forward)
            return None
        leader = Leader(model, group, NoChildren())
        with pytest.raises(EngineError, match="without an order for the followers"):
            leader.hidden(batch)
        hidden = []
        for order in (b"fine", b"broken", b"fine again"):
            leader.expect(order)
            fragile.is_broken = order == b"broken"
            if fragile.is_broken:
                with pytest.raises(ValueError, match="a bad row"):
                    leader.hidden(batch)
            else:
                hidden.append(leader.hidden(batch))
                assert leader.head(hidden[-1]).shape == (len(hidden[-1]), model.shape.vocab_size)
        leader.close()
        leader.close()
        leader.expect(b"too late")
        with pytest.raises(EngineError, match="the ranks were closed"):
            leader.hidden(batch)
        return hidden

    hidden, _ = run_ranks(2, act)
    assert hidden is not None
    assert torch.equal(hidden[0], hidden[1])
    assert capsys.readouterr().err.count("rank 1: ValueError: a bad row") == 1


def test_a_leader_beats_while_nothing_runs(tmp_path: Path) -> None:
    """A follower would give up after half a second without a word."""
    config = EVERY["sdar_moe"]
    path = write(tmp_path / "model", config, random_weights(config))

    def act(group: Group) -> bool:
        model = load_part(path, group)
        if group.rank == 1:
            follow(model, group, lambda order: None)
            return True
        leader = Leader(model, group, NoChildren())
        leader._closing.wait(1.5)
        leader.close()
        return leader._lost == "the ranks were closed"

    assert run_ranks(2, act, seconds=0.5) == [True, True]


def test_a_follower_gives_up_on_a_silent_leader(tmp_path: Path) -> None:
    config = EVERY["sdar_moe"]
    path = write(tmp_path / "model", config, random_weights(config))

    def act(group: Group) -> None:
        model = load_part(path, group)
        if group.rank == 1:
            with pytest.raises(EngineError, match=r"not answered for 0\.5 s"):
                follow(model, group, lambda order: None)

    run_ranks(2, act, seconds=0.5)
