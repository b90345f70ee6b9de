"""Ranks with tokens of their own: shared layers as on one rank, and forwards that fail on one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.core.plan import Row, RowKind, RowResult, StepPlan, StepResult
from sfumato.core.request import Request
from sfumato.errors import EngineError
from sfumato.models.batch import Batch, Segment, group_segments
from sfumato.models.folder import read_folder
from sfumato.models.language_model import LanguageModel
from sfumato.models.weights import load_model
from sfumato.parallel.groups import Group
from sfumato.parallel.lockstep import LockstepRunner
from sfumato.parallel.meeting import MeetingRanks
from tests.models.checkpoints import EVERY, random_weights, write
from tests.parallel.test_split import ALL
from tests.parallel.threads import run_ranks

ROW = Row(request_id="a", kind=RowKind.DENOISE, start=0, end=8)


def batch_of(rank: int, length: int, is_gemma: bool) -> Batch:
    """Return one row that sees itself, of a rank's own length and tokens; not all states are wanted."""
    generator = torch.Generator().manual_seed(rank)
    groups = group_segments([Segment(0, length, None, None)], "cpu")
    return Batch(
        token_ids=torch.randint(0, 88, (length,), generator=generator),
        positions=torch.arange(length),
        groups=groups,
        windowed=groups,
        output_tokens=torch.arange(rank % 2, length, 3),
        is_context=torch.zeros(length, dtype=torch.bool) if is_gemma and rank else None,
    )


def load_part(path: Path, group: Group) -> tuple[LanguageModel, MeetingRanks]:
    """Load one rank's model."""
    ranks = MeetingRanks(group.rank, group.size)
    ranks.group = group
    model = load_model(
        read_folder(str(path)),
        dtype=torch.float32,
        device="cpu",
        divide=lambda model: model.divide_meetings(ranks),
    )
    return model, ranks


@pytest.mark.parametrize("name", ALL)
def test_every_rank_computes_its_own_tokens(name: str, tmp_path: Path) -> None:
    config, is_gemma = ALL[name], name == "diffusion_gemma"
    path = write(tmp_path / "model", config, random_weights(config))
    # The last rank has nothing.
    lengths = [12, 28, 0]
    whole = load_model(read_folder(str(path)), dtype=torch.float32, device="cpu")

    def forward(group: Group) -> Tensor | None:
        model, _ = load_part(path, group)
        if not lengths[group.rank]:
            model.take_no_part()
            return None
        return model.hidden(batch_of(group.rank, lengths[group.rank], is_gemma))

    for rank, hidden in enumerate(run_ranks(3, forward)):
        if hidden is None:
            assert not lengths[rank]
            continue
        with torch.inference_mode():
            expected = whole.hidden(batch_of(rank, lengths[rank], is_gemma))
        torch.testing.assert_close(hidden, expected, rtol=2e-4, atol=2e-4)


def test_only_experts_are_shared_where_there_are_any(tmp_path: Path) -> None:
    for name, config in EVERY.items():
        folder = read_folder(str(write(tmp_path / name, config, random_weights(config))))
        part = load_model(
            folder,
            dtype=torch.float32,
            device="cpu",
            pack=False,
            divide=lambda model: model.divide_meetings(MeetingRanks(1, 3)),
        )
        whole = load_model(folder, dtype=torch.float32, device="cpu", pack=False)
        divided = {
            key.split(".", 2)[2]
            for (key, own), other in zip(part.named_parameters(), whole.parameters(), strict=True)
            if own.shape != other.shape
        }
        has_experts = any(layer.is_sparse for layer in whole.meetings())
        dense = {"mlp.gate_up.weight", "mlp.down.weight"}
        sparse = (
            {"experts.gate_up", "experts.down"}
            if is_gemma(name)
            else {"mlp.experts.gate_up", "mlp.experts.down"}
        )
        assert divided == (sparse if has_experts else dense)


def is_gemma(name: str) -> bool:
    """Whether a family has its experts beside its MLP."""
    return name == "diffusion_gemma"


class OneForward:
    """A runner that makes one forward and turns what it raises into results, as the text runner does."""

    def __init__(self, model: LanguageModel, batch: Batch) -> None:
        self._model, self._batch = model, batch
        self.hidden: Tensor | None = None

    def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult:
        """Run."""
        try:
            self.hidden = self._model.hidden(self._batch)
        except RuntimeError as error:
            return StepResult(launch_id=plan.launch_id, rows=(RowResult(row=ROW, error=str(error)),))
        return StepResult(launch_id=plan.launch_id, rows=(RowResult(row=ROW),))


@pytest.mark.parametrize("broken", ["layers.0.attention_norm", "layers.1.attention_norm", "norm"])
def test_a_forward_that_fails_on_one_rank_leaves_the_others_theirs(broken: str, tmp_path: Path) -> None:
    config = EVERY["sdar_moe"]
    path = write(tmp_path / "model", config, random_weights(config))
    whole = load_model(read_folder(str(path)), dtype=torch.float32, device="cpu")

    def fail(*_: object) -> None:
        raise RuntimeError("something is wrong on this rank")

    def launch(group: Group) -> tuple[list[str | None], Tensor | None]:
        model, ranks = load_part(path, group)
        inner = OneForward(model, batch_of(group.rank, 8 + group.rank, False))
        runner = LockstepRunner(inner, model, ranks, lambda error: error)
        plan = StepPlan(launch_id=3, rows=(ROW,))
        errors = []
        hook = model.get_submodule(broken).register_forward_pre_hook(fail) if group.rank == 1 else None
        errors.append(runner.launch(plan, {}).rows[0].error)
        if hook is not None:
            hook.remove()
        # The next one goes on as if nothing had been.
        errors.append(runner.launch(plan, {}).rows[0].error)
        result = runner.launch(StepPlan(launch_id=4, is_idle_forward=True), {})
        assert (result.launch_id, result.rows) == (4, ())
        return errors, inner.hidden

    found = run_ranks(2, launch)
    assert [errors for errors, _ in found] == [[None, None], ["something is wrong on this rank", None]]
    for rank, (_, hidden) in enumerate(found):
        assert hidden is not None
        with torch.inference_mode():
            expected = whole.hidden(batch_of(rank, 8 + rank, False))
        torch.testing.assert_close(hidden, expected, rtol=2e-4, atol=2e-4)


def test_a_lost_rank_is_explained() -> None:
    class Lost:
        def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult:
            raise EngineError("broken")

    runner = LockstepRunner(Lost(), None, MeetingRanks(0, 2), lambda error: EngineError(f"rank 1: {error}"))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="rank 1: broken"):
        runner.launch(StepPlan(launch_id=1, rows=(ROW,)), {})
