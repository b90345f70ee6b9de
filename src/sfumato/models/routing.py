"""Which experts a token uses, and with what weight; equal scores go to the lower expert.

Letters: N tokens, E experts, C experts per token, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.kernels import run_on

# Keeps the sum of chosen scores above zero; LLaDA2's own number.
_TINY = 1e-20


def best(values: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest values along the last axis, of equals the first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def softmax_choice(logits: Tensor, count: int, *, is_normalised: bool) -> tuple[Tensor, Tensor]:
    """Return the most probable experts i64[N, C] and their probabilities f32[N, C], of sum 1 if normalised.

    logits: [N, E].
    """
    probabilities = logits.float().softmax(-1)
    chosen = best(probabilities, count)
    weights = probabilities.gather(-1, chosen)
    return chosen, weights / weights.sum(-1, keepdim=True) if is_normalised else weights


class SoftmaxRouter(nn.Module):
    """Probabilities over all experts (Qwen3-MoE)."""

    def __init__(self, width: int, num_experts: int, num_chosen: int, *, is_normalised: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width), requires_grad=False)
        self.num_chosen = num_chosen
        self.is_normalised = is_normalised

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return experts i64[N, C] and weights f32[N, C] of tokens [N, width]."""
        logits = F.linear(x, self.weight)
        return softmax_choice(logits, self.num_chosen, is_normalised=self.is_normalised)


class Pool(Protocol):
    """Which experts a token may choose from. block_length: tokens that choose together; None: each alone.

    groups: their number and how many of them are kept, where a token's own scores say which.
    """

    @property
    def block_length(self) -> int | None: ...

    @property
    def groups(self) -> tuple[int, int] | None: ...

    def candidates(self, ranks: Tensor, blocks: Tensor | None) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Groups:
    """Experts lie in `count` groups; a token chooses from its `kept` best groups alone."""

    count: int
    kept: int
    block_length: None = None

    @property
    def groups(self) -> tuple[int, int]:
        """Return their number, and how many are kept."""
        return self.count, self.kept

    def candidates(self, ranks: Tensor, blocks: Tensor | None) -> Tensor:
        """Return bool[N, E], True in the kept groups: those with the largest sum of their two best ranks."""
        grouped = ranks.view(len(ranks), self.count, ranks.shape[1] // self.count)
        scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best(scores, self.kept), True)
        return kept.repeat_interleave(grouped.shape[-1], dim=1)


@dataclass(frozen=True, slots=True)
class BlockCapacity:
    """The tokens of a block choose from `capacity` experts: those that rank highest with any of them."""

    block_length: int
    capacity: int
    groups: None = None

    def candidates(self, ranks: Tensor, blocks: Tensor | None) -> Tensor:
        """Return bool[N, E]. ranks: f32[N, E]; blocks: i64[N], each token's block, counted from 0."""
        assert blocks is not None
        highest = torch.full_like(ranks, -torch.inf)
        highest.scatter_reduce_(0, blocks[:, None].expand_as(ranks), ranks, "amax")
        chosen = best(highest, self.capacity)
        return torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, chosen, True)[blocks]


def block_of_tokens(positions: Tensor, block_length: int) -> Tensor:
    """Return i64[N], the block of each packed token, counted over the batch.

    positions: i64[N], of rows of whole blocks; two rows never share a block.
    """
    is_first = (positions % block_length == 0) | (positions.diff(prepend=positions[:1]) != 1)
    is_first[0] = False
    return is_first.cumsum(0)


class SigmoidRouter(nn.Module):
    """Independent scores; a bias changes which experts are chosen, not their weights (LLaDA2).

    Weight and bias are float32 in any model: the choice is a matter of small differences.
    """

    def __init__(self, width: int, num_experts: int, num_chosen: int, *, scale: float, pool: Pool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(num_experts), requires_grad=False)
        self.num_chosen = num_chosen
        self.scale = scale
        self.pool = pool

    def logits(self, x: Tensor) -> Tensor:
        """Return f32[N, E] of tokens [N, width]."""
        return F.linear(x.float(), self.weight.float())

    def forward(self, x: Tensor, blocks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return experts i64[N, C] and weights f32[N, C] of tokens [N, width]."""
        if self.pool.groups is not None and run_on(x):
            from sfumato.models.kernels import routing

            groups, kept = self.pool.groups
            if routing.can_choose(len(self.bias), groups):
                return routing.choose(
                    self.logits(x),
                    self.bias,
                    self.num_chosen,
                    groups=groups,
                    kept=kept,
                    scale=self.scale,
                    tiny=_TINY,
                )
        scores = self.logits(x).sigmoid()
        ranks = scores + self.bias
        ranks = ranks.masked_fill(~self.pool.candidates(ranks, blocks), -torch.inf)
        chosen = best(ranks, self.num_chosen)
        weights = scores.gather(-1, chosen)
        return chosen, weights / (weights.sum(-1, keepdim=True) + _TINY) * self.scale


class Routing(Protocol):
    """A kind of router as a value. block_length: tokens that choose together; None: each alone."""

    @property
    def block_length(self) -> int | None: ...

    def make_router(self, width: int, num_experts: int, num_chosen: int) -> nn.Module: ...


@dataclass(frozen=True, slots=True)
class SoftmaxRouting:
    """See SoftmaxRouter."""

    is_normalised: bool
    block_length: None = None

    def make_router(self, width: int, num_experts: int, num_chosen: int) -> nn.Module:
        """Make the module."""
        return SoftmaxRouter(width, num_experts, num_chosen, is_normalised=self.is_normalised)


@dataclass(frozen=True, slots=True)
class SigmoidRouting:
    """See SigmoidRouter."""

    scale: float
    pool: Pool

    @property
    def block_length(self) -> int | None:
        """Return how many tokens choose together, or None."""
        return self.pool.block_length

    def make_router(self, width: int, num_experts: int, num_chosen: int) -> nn.Module:
        """Make the module."""
        return SigmoidRouter(width, num_experts, num_chosen, scale=self.scale, pool=self.pool)
