"""Choosing the most confident positions of each row; ties go to the position further left.

Letters: R rows, W positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rank_descending(score: Tensor, eligible: Tensor) -> Tensor:
    """Return i64[R, W]: 0 for the best eligible position of a row, 1 for the next; others come last."""
    order = score.masked_fill(~eligible, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.empty_like(order)
    return ranks.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))


def top_positions(score: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """Return bool[R, W]: the `count` i64[R] best eligible positions of each row."""
    return (rank_descending(score, eligible) < count[:, None]) & eligible


def scheduled_count(total: Tensor, num_steps: Tensor, step: Tensor) -> Tensor:
    """Return i64[R]: how many of `total` positions this step takes; early steps take the remainder."""
    return total // num_steps + (step < total % num_steps).long()
