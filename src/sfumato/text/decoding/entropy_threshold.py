"""Block decoding by entropy (d3LLM, arXiv:2601.07568; SGLang's EntropyThreshold): one block at a time.

The forms of LLaDA (`generate`) and Dream (`entropy_threshold`) differ in what happens at the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sfumato.cache.approximate import Reuse
from sfumato.core.spec import TextSpec
from sfumato.core.traits import ModelTraits
from sfumato.text.canvas import Canvas
from sfumato.text.decoding.protocol import (
    Algorithm,
    Outcome,
    Statistics,
    View,
    Wanted,
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
class EntropyThreshold(Algorithm):
    """Each step decides the position of lowest entropy and all below a threshold."""

    threshold: float | None = parameter(
        0.4,
        "positions of lower entropy are decided together, in nats; null: scheduled counts",
        minimum=0.0,
    )
    is_inclusive: bool = parameter(False, "positions exactly at the threshold are decided too (LLaDA's form)")
    cache: str = cache_parameter()
    steps: int | None = parameter(
        None,
        "denoise steps over the whole canvas where threshold is null; a multiple of its blocks",
        minimum=1,
    )
    max_steps: int | None = parameter(None, "steps per block; the last one decides what is left", minimum=1)

    runs_ahead: ClassVar[bool] = True

    @property
    def scheduled_steps(self) -> int | None:
        return self.steps

    @property
    def wanted(self) -> Wanted:
        return Wanted(entropy=True)

    def walk(self, canvas: Canvas, spec: TextSpec, traits: ModelTraits) -> Walk:
        """Go block by block, reusing keys as `cache` says."""
        return block_walk(traits, Reuse(self.cache))

    def check(self, *, block_length: int, num_blocks: int, is_bidirectional: bool) -> None:
        """The steps must divide over the blocks; an exact cache needs no approximate one."""
        require_whole_steps(self.steps, num_blocks)
        check_cache(self.cache, is_bidirectional)

    @staticmethod
    def decide(
        rows: Sequence[EntropyThreshold], view: View, statistics: Statistics, states: Sequence[Any]
    ) -> Outcome:
        """Compare with the threshold; the lowest entropy always goes."""
        assert statistics.entropy is not None
        entropy = statistics.entropy
        threshold = per_row((-1.0 if row.threshold is None else row.threshold for row in rows), view)[:, None]
        is_inclusive = per_row((row.is_inclusive for row in rows), view)[:, None]
        takes = torch.where(is_inclusive, entropy <= threshold, entropy < threshold)
        caps = per_row((row.max_steps or 0 for row in rows), view)
        is_last = (caps > 0) & (view.step + 1 >= caps)
        count = torch.where(
            per_row((row.threshold is None for row in rows), view),
            scheduled_count(view.masks_at_start, planned_steps(rows, view), view.step),
            1,
        )
        takes |= (rank_descending(-entropy, view.eligible) < count[:, None]) | is_last[:, None]
        return Outcome(transfer=takes & view.eligible, tokens=statistics.token)
