"""Confidence-aware parallel decoding with approximate caches (Fast-dLLM, arXiv:2505.22618, 3.2 and 3.3).

dInfer's `factor` rule (inclusionAI/dInfer, `parallel_strategy.py`) is a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.cache.approximate import Reuse
from sfumato.core.spec import TextSpec
from sfumato.core.traits import ModelTraits
from sfumato.text.canvas import Canvas
from sfumato.text.decoding.protocol import (
    Algorithm,
    Outcome,
    Statistics,
    View,
    cache_parameter,
    check_cache,
    parameter,
    per_row,
    planned_steps,
    require_whole_steps,
)
from sfumato.text.decoding.ranking import rank_descending, scheduled_count
from sfumato.text.walk import Walk, block_walk


@dataclass(frozen=True, slots=True)
class FastDLLM(Algorithm):
    """Each step decides the best position and all that reach the threshold, or a scheduled number."""

    threshold: float | None = parameter(
        0.9, "positions at least this confident are decided together; null: scheduled counts", minimum=0.0
    )
    factor: float | None = parameter(
        None, "dInfer's rule instead: the i-th best needs a confidence of 1 - factor / (i + 2)", minimum=0.0
    )
    cache: str = cache_parameter()
    steps: int | None = parameter(
        None,
        "denoise steps over the whole canvas where threshold is null; a multiple of its blocks",
        minimum=1,
    )
    max_steps: int | None = parameter(None, "steps per block; the last one decides what is left", minimum=1)
    # Reference variant (Fast-dLLM, not dInfer): a cached block takes two forwards even if one finished it.
    looks_late: bool = False

    runs_ahead: ClassVar[bool] = True

    @property
    def scheduled_steps(self) -> int | None:
        return self.steps

    def walk(self, canvas: Canvas, spec: TextSpec, traits: ModelTraits) -> Walk:
        """Go block by block, reusing keys as `cache` says."""
        return block_walk(traits, Reuse(self.cache))

    def check(self, *, block_length: int, num_blocks: int, is_bidirectional: bool) -> None:
        """The steps must divide over the blocks; an exact cache needs no approximate one."""
        require_whole_steps(self.steps, num_blocks)
        check_cache(self.cache, is_bidirectional)

    @staticmethod
    def decide(
        rows: Sequence[FastDLLM], view: View, statistics: Statistics, states: Sequence[Any]
    ) -> Outcome:
        """Rank the eligible positions and take a prefix of the ranking."""
        confidence = statistics.confidence.masked_fill(~view.eligible, -torch.inf)
        ranks = rank_descending(confidence, view.eligible)
        num_eligible = view.eligible.sum(-1)
        limit = per_row((float("inf") if row.threshold is None else row.threshold for row in rows), view)
        by_threshold = (confidence >= limit[:, None]).sum(-1).clamp(min=1)
        count = scheduled_count(view.masks_at_start, planned_steps(rows, view), view.step)
        count = torch.where(per_row((row.threshold is None for row in rows), view), count, by_threshold)
        if any(row.factor is not None for row in rows):
            by_factor = _count_by_factor(
                confidence, num_eligible, per_row((row.factor or 0.0 for row in rows), view)
            )
            count = torch.where(per_row((row.factor is not None for row in rows), view), by_factor, count)
        caps = per_row((row.max_steps or 0 for row in rows), view)
        count = torch.where((caps > 0) & (view.step + 1 >= caps), num_eligible, count)
        transfer = (ranks < count[:, None]) & view.eligible
        done = None
        if any(row.looks_late for row in rows):
            is_early = per_row((row.looks_late for row in rows), view) & (view.step == 0)
            done = ~(view.eligible & ~transfer).any(-1) & ~is_early
        return Outcome(transfer=transfer, tokens=statistics.token, done=done)


def _count_by_factor(confidence: Tensor, num_eligible: Tensor, factor: Tensor) -> Tensor:
    """Return i64[R]: the length of the leading run within its limits; all where only the last one fails."""
    ordered = confidence.sort(dim=-1, descending=True).values
    index = torch.arange(ordered.shape[-1], device=ordered.device)
    limits = 1 - factor[:, None] / (index + 2)
    meets = (ordered >= limits) | (index == 0)
    meets &= index < num_eligible[:, None]
    run = meets.long().cumprod(-1).sum(-1)
    return torch.where(run == num_eligible - 1, num_eligible, run)
