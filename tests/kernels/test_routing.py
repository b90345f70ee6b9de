"""Experts chosen, sorted and summed by kernels against the torch forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sfumato.models import experts, layers, routing
from sfumato.models.experts import Experts
from sfumato.models.kernels.routing import can_choose, sort_chosen
from sfumato.models.routing import Groups, SigmoidRouter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return seeded noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(
    ("num", "groups", "kept", "count"), [(16, 4, 2, 3), (32, 8, 4, 8), (8, 1, 1, 2), (8, 8, 5, 3)]
)
def test_a_choice_is_the_routers(
    monkeypatch: pytest.MonkeyPatch, num: int, groups: int, kept: int, count: int
) -> None:
    router = SigmoidRouter(24, num, count, scale=2.5, pool=Groups(groups, kept)).to(DEVICE)
    router.weight.copy_(draw(num, 24))
    router.bias.copy_(draw(num, seed=1) * 0.3)
    x = draw(9, 24, seed=2)
    # Equal scores: the lower expert.
    router.weight[num // 2 :] = router.weight[: num // 2]
    router.bias[num // 2 :] = router.bias[: num // 2]
    monkeypatch.setattr(routing, "run_on", lambda tensor: False)
    expected = router(x)
    monkeypatch.setattr(routing, "run_on", lambda tensor: True)
    found = router(x)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_what_is_no_number_chooses_experts_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    router = SigmoidRouter(8, 16, 4, scale=1.0, pool=Groups(4, 2)).to(DEVICE)
    router.weight.copy_(draw(16, 8))
    router.bias.zero_()
    monkeypatch.setattr(routing, "run_on", lambda tensor: True)
    chosen, _ = router(torch.full((2, 8), torch.nan, device=DEVICE))
    assert bool(((chosen >= 0) & (chosen < 16)).all())
    assert not can_choose(12, 4)
    assert not can_choose(16, 3)


@pytest.mark.parametrize("tokens", [1, 40])
def test_chosen_experts_in_order(tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    # Experts of other ranks, from 10 on, lie behind.
    chosen = torch.randint(0, 11, (tokens, 5), generator=generator).to(DEVICE)[:, :3]
    expected, order = chosen.flatten().sort(stable=True)
    found, places, ends = sort_chosen(chosen, 10)
    assert torch.equal(found, order // 3)
    assert torch.equal(order[places], torch.arange(3 * tokens, device=DEVICE))
    every = torch.arange(10, device=DEVICE)
    assert torch.equal(ends, torch.searchsorted(expected, every, right=True, out_int32=True))


def test_a_mixture_is_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Experts(8, 32, 24, num_chosen=3).to(DEVICE)
    made.gate_up.copy_(draw(8, 48, 32) * 0.3)
    made.down.copy_(draw(8, 32, 24, seed=1) * 0.3)
    x, weights = draw(7, 32, seed=2), draw(7, 3, seed=3)
    chosen = torch.stack(
        [torch.randperm(8, generator=torch.Generator().manual_seed(t))[:3] for t in range(7)]
    )
    for module in (experts, layers):
        monkeypatch.setattr(module, "run_on", lambda tensor: False)
    expected = made(x, chosen.to(DEVICE), weights)
    for module in (experts, layers):
        monkeypatch.setattr(module, "run_on", lambda tensor: True)
    torch.testing.assert_close(made(x, chosen.to(DEVICE), weights), expected, atol=1e-5, rtol=1e-4)
    assert made(x[:0], chosen[:0].to(DEVICE), weights[:0]).shape == (0, 32)
