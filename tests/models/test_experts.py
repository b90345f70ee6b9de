"""Experts and routers against one token at a time: choice, ties, weights, and the ways to compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.models import experts
from sfumato.models.experts import Experts
from sfumato.models.layers import gelu_tanh
from sfumato.models.routing import (
    BlockCapacity,
    Groups,
    SigmoidRouter,
    SoftmaxRouter,
    best,
    block_of_tokens,
)

EXPERTS, WIDTH, INNER = 12, 16, 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return seeded noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def make_experts(dtype: torch.dtype = torch.float32) -> Experts:
    """Return random experts."""
    experts = Experts(EXPERTS, WIDTH, INNER, gelu_tanh, num_chosen=3)
    experts.gate_up.copy_(draw(EXPERTS, 2 * INNER, WIDTH) * 0.3)
    experts.down.copy_(draw(EXPERTS, WIDTH, INNER) * 0.3)
    return experts.to(dtype)


def naive_experts(experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Compute token by token and expert by expert."""
    output = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            gate, up = (experts.gate_up[expert] @ x[token]).chunk(2)
            output[token] += weight * (experts.down[expert] @ (gelu_tanh(gate) * up))
    return output


def choose(num_tokens: int, count: int = 3) -> tuple[Tensor, Tensor]:
    """Return random experts and weights; some experts have no token."""
    chosen = draw(num_tokens, EXPERTS - 2).argsort(-1)[:, :count]
    return chosen, draw(num_tokens, count).abs()


@pytest.mark.parametrize("num_tokens", [1, 7, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_experts_are_a_weighted_sum(num_tokens: int, packed: bool) -> None:
    experts, x, (chosen, weights) = make_experts(), draw(num_tokens, WIDTH), choose(num_tokens)
    expected = naive_experts(experts, x, chosen, weights)
    if packed:
        experts.pack()
    torch.testing.assert_close(experts(x, chosen, weights), expected, atol=1e-5, rtol=1e-4)


def test_no_token_at_all() -> None:
    chosen = torch.zeros(0, 3, dtype=torch.long)
    assert make_experts()(draw(0, WIDTH), chosen, draw(0, 3)).shape == (0, WIDTH)


@pytest.mark.parametrize("ends", [[0, 0, 4, 4, 5] + [9] * 7, [0] * 11 + [9], [9] * 12])
def test_the_grouped_product_is_the_single_products(ends: list[int]) -> None:
    experts, rows = make_experts(), draw(9, WIDTH)
    limits = torch.tensor(ends, dtype=torch.int32)
    expected = experts.one_by_one(rows, limits)
    torch.testing.assert_close(experts.grouped(rows, limits), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ends", [[0, 0, 4, 4, 5] + [9] * 7, [0] * 11 + [9], [3] * 12])
def test_the_kernel_is_the_single_products(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, ends: list[int]
) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made, rows = make_experts(dtype).to(device), draw(9, WIDTH).to(dtype).to(device)
    limits = torch.tensor(ends, dtype=torch.int32, device=device)
    expected = made.one_by_one(rows, limits)
    monkeypatch.setattr(experts, "run_on", lambda tensor: True)
    found = made.grouped(rows, limits)[: ends[-1]]
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_bfloat16_experts_stay_close_and_are_summed_in_float32() -> None:
    x, (chosen, weights) = draw(9, WIDTH), choose(9)
    expected = naive_experts(make_experts(), x, chosen, weights)
    found = make_experts(torch.bfloat16)(x.bfloat16(), chosen, weights)
    assert found.dtype is torch.bfloat16
    assert float((found.float() - expected).abs().max()) < 0.03 * float(expected.abs().max())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_on_a_gpu(dtype: torch.dtype) -> None:
    experts, x, (chosen, weights) = make_experts(dtype), draw(40, WIDTH).to(dtype), choose(40)
    expected = experts(x, chosen, weights)
    found = experts.cuda()(x.cuda(), chosen.cuda(), weights.cuda()).cpu()
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_of_equals_the_first_is_best() -> None:
    assert best(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]), 3).tolist() == [[1, 2, 4]]
    assert best(torch.zeros(1, 40), 4).tolist() == [[0, 1, 2, 3]]


def naive_groups(ranks: list[float], groups: int, kept: int) -> set[int]:
    """Return the experts of the kept groups of one token; of equal groups the first."""
    size = len(ranks) // groups
    sums = [sum(sorted(ranks[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    order = sorted(range(groups), key=lambda group: (-sums[group], group))
    return {expert for group in order[:kept] for expert in range(group * size, (group + 1) * size)}


def make_router(pool: Groups | BlockCapacity, bias: Tensor, count: int = 3) -> SigmoidRouter:
    """Return a router with random scores."""
    router = SigmoidRouter(WIDTH, EXPERTS, count, scale=2.5, pool=pool)
    router.weight.copy_(draw(EXPERTS, WIDTH))
    router.bias.copy_(bias)
    return router


def expect_choice(
    router: SigmoidRouter, x: Tensor, candidates: list[set[int]], found: tuple[Tensor, Tensor]
) -> None:
    """Compare a choice among candidates with one made token by token."""
    scores = (x @ router.weight.T).sigmoid()
    for token, allowed in enumerate(candidates):
        ranks = (scores[token] + router.bias).tolist()
        order = sorted(allowed, key=lambda expert: (-ranks[expert], expert))[: router.num_chosen]
        assert found[0][token].tolist() == order
        own = scores[token][order]
        torch.testing.assert_close(found[1][token], own / own.sum() * router.scale)


@pytest.mark.parametrize(
    ("groups", "kept", "count"), [(3, 2, 3), (4, 1, 3), (6, 2, 3), (12, 5, 3), (1, 1, 12)]
)
def test_the_grouped_choice_is_made_with_the_bias_and_weighed_without(
    groups: int, kept: int, count: int
) -> None:
    router, x = make_router(Groups(groups, kept), draw(EXPERTS) * 2, count), draw(20, WIDTH)
    ranks = (x @ router.weight.T).sigmoid() + router.bias
    candidates = [naive_groups(row, groups, kept) for row in ranks.tolist()]
    expect_choice(router, x, candidates, router(x))


def test_equal_groups_and_experts_are_taken_in_order() -> None:
    router = make_router(Groups(3, 2), torch.zeros(EXPERTS))
    router.weight.zero_()
    chosen, weights = router(draw(2, WIDTH))
    assert chosen.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 2.5 / 3))
    # The last group's two best are equal to the first's: the middle one wins, then the first.
    router.bias[4:8] = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert router(draw(1, WIDTH))[0].tolist() == [[5, 6, 0]]


def test_negative_ranks_never_let_a_foreign_group_in() -> None:
    router, x = make_router(Groups(3, 1), torch.full((EXPERTS,), -5.0)), draw(20, WIDTH)
    assert all(len({expert // 4 for expert in row}) == 1 for row in router(x)[0].tolist())


def test_rows_never_share_a_block() -> None:
    assert block_of_tokens(torch.tensor([4, 5, 6, 7, 4, 5, 6, 7]), 4).tolist() == [0] * 4 + [1] * 4
    assert block_of_tokens(torch.tensor([6, 7, 5, 6]), 4).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("capacity", [3, 5, 12])
def test_a_block_shares_its_candidates(capacity: int) -> None:
    pool = BlockCapacity(block_length=4, capacity=capacity)
    router, x = make_router(pool, draw(EXPERTS)), draw(10, WIDTH)
    # Two rows: blocks 1 and 2 of one, block 2 of the other, which ends early.
    positions = torch.tensor([4, 5, 6, 7, 8, 9, 10, 11, 8, 9])
    blocks = block_of_tokens(positions, 4)
    assert blocks.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    ranks = ((x @ router.weight.T).sigmoid() + router.bias).tolist()
    candidates = []
    for token in range(10):
        members = [other for other in range(10) if blocks[other] == blocks[token]]
        top = [max(ranks[member][expert] for member in members) for expert in range(EXPERTS)]
        candidates.append(set(sorted(range(EXPERTS), key=lambda expert: (-top[expert], expert))[:capacity]))
    expect_choice(router, x, candidates, router(x, blocks))


@pytest.mark.parametrize("is_normalised", [False, True])
def test_the_softmax_choice(is_normalised: bool) -> None:
    router = SoftmaxRouter(WIDTH, EXPERTS, 3, is_normalised=is_normalised)
    router.weight.copy_(draw(EXPERTS, WIDTH))
    x = draw(5, WIDTH)
    chosen, weights = router(x)
    expected, experts = F.linear(x, router.weight).softmax(-1).topk(3)
    assert torch.equal(chosen, experts)
    torch.testing.assert_close(
        weights, expected / expected.sum(-1, keepdim=True) if is_normalised else expected
    )
