"""Confidence-aware parallel decoding (Fast-dLLM, arXiv:2505.22618, 3.3) with dInfer's `factor` rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.text.decoding.protocol import (
    Outcome,
    Statistics,
    Transform,
    View,
    parameter,
    require_whole_steps,
)
from sfumato.text.decoding.ranking import rank_descending, scheduled_count


@dataclass(frozen=True, slots=True)
class FastDLLM:
    """Each step decides the best position and all that reach the threshold, or a scheduled number."""

    threshold: float | None = parameter(
        0.9, "positions at least this confident are decided together; null: scheduled counts", minimum=0.0
    )
    factor: float | None = parameter(
        None, "dInfer's rule instead: the i-th best needs a confidence of 1 - factor / (i + 2)", minimum=0.0
    )
    steps: int | None = parameter(
        None,
        "denoise steps over the whole canvas where threshold is null; a multiple of its blocks",
        minimum=1,
    )
    max_steps: int | None = parameter(None, "steps per block; the last one decides what is left", minimum=1)

    is_monotone: ClassVar[bool] = True
    reads_decided: ClassVar[bool] = False

    @property
    def needs_uniform(self) -> bool:
        return False

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """Nothing beyond what every request has."""
        return Transform()

    def check(self, *, block_length: int, num_blocks: int, is_bidirectional: bool) -> None:
        """The steps must divide over the blocks."""
        require_whole_steps(self.steps, num_blocks)

    @staticmethod
    def decide(
        rows: Sequence[FastDLLM], view: View, statistics: Statistics, states: Sequence[Any]
    ) -> Outcome:
        """Rank the undecided positions and take a prefix of the ranking."""
        device = view.step.device
        confidence = statistics.confidence.masked_fill(~view.undecided, -torch.inf)
        ranks = rank_descending(confidence, view.undecided)
        num_undecided = view.undecided.sum(-1)
        limit = [float("inf") if row.threshold is None else row.threshold for row in rows]
        by_threshold = (confidence >= torch.tensor(limit, device=device)[:, None]).sum(-1).clamp(min=1)
        num_steps = torch.tensor(
            [
                row.steps // blocks if row.steps else length
                for row, blocks, length in zip(rows, view.num_blocks, view.block_length, strict=True)
            ],
            device=device,
        )
        count = scheduled_count(view.masks_at_start, num_steps, view.step)
        count = torch.where(
            torch.tensor([row.threshold is None for row in rows], device=device), count, by_threshold
        )
        if any(row.factor is not None for row in rows):
            factor = torch.tensor([row.factor or 0.0 for row in rows], device=device)
            by_factor = _count_by_factor(confidence, num_undecided, factor)
            has_factor = torch.tensor([row.factor is not None for row in rows], device=device)
            count = torch.where(has_factor, by_factor, count)
        caps = [row.max_steps or 0 for row in rows]
        is_last = torch.tensor([bool(cap) for cap in caps], device=device)
        is_last &= view.step + 1 >= torch.tensor(caps, device=device)
        count = torch.where(is_last, num_undecided, count)
        return Outcome(transfer=(ranks < count[:, None]) & view.undecided, tokens=statistics.token)


def _count_by_factor(confidence: Tensor, num_undecided: Tensor, factor: Tensor) -> Tensor:
    """Return i64[R]: the length of the leading run within its limits; all where only the last one fails."""
    ordered = confidence.sort(dim=-1, descending=True).values
    index = torch.arange(ordered.shape[-1], device=ordered.device)
    limits = 1 - factor[:, None] / (index + 2)
    meets = (ordered >= limits) | (index == 0)
    meets &= index < num_undecided[:, None]
    run = meets.long().cumprod(-1).sum(-1)
    return torch.where(run == num_undecided - 1, num_undecided, run)
