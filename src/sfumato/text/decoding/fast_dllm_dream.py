"""Fast-dLLM's block decoding with a cache for models with shifted logits (arXiv:2505.22618, Dream).

The forward over the whole canvas that opens a block decides the block's first position alone: later, cached
forwards have no logits for it, because those come from the position in front. `generation_utils_block.py` of
NVlabs/Fast-dLLM, and the copy in hao-ai-lab/d3LLM with a threshold on the entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sfumato.cache.approximate import Reuse
from sfumato.core.spec import TextSpec
from sfumato.core.traits import ModelTraits
from sfumato.text.canvas import Canvas
from sfumato.text.decoding.dream import shares
from sfumato.text.decoding.protocol import (
    Algorithm,
    Outcome,
    Statistics,
    Transform,
    View,
    Wanted,
    cache_parameter,
    parameter,
    per_row,
    require_bidirectional,
    require_whole_steps,
)
from sfumato.text.decoding.ranking import rank_descending
from sfumato.text.walk import Walk, block_walk


@dataclass(frozen=True, slots=True)
class FastDLLMDream(Algorithm):
    """Each step decides the best position and all that reach a threshold, or a share of the masks."""

    alg: str = parameter(
        "confidence_threshold",
        "a threshold on the confidence or the entropy, or a schedule by entropy",
        choices=("confidence_threshold", "entropy_threshold", "entropy"),
    )
    threshold: float = parameter(
        0.9, "at least this confidence, or less than this entropy in nats", minimum=0.0
    )
    cache: str = cache_parameter(Reuse.DUAL, Reuse.PREFIX)
    steps: int | None = parameter(
        None, "entropy: denoise steps over the whole canvas; a multiple of its blocks", minimum=1
    )
    eps: float = parameter(1e-3, "entropy: noise level at which the schedule ends", minimum=1e-6, maximum=0.5)
    # Reference variant: a schedule may decide nothing in a step, and may end with masks left.
    is_reference: bool = False

    @property
    def scheduled_steps(self) -> int | None:
        return self.steps

    @property
    def wanted(self) -> Wanted:
        return Wanted(entropy=self.alg != "confidence_threshold")

    def walk(self, canvas: Canvas, spec: TextSpec, traits: ModelTraits) -> Walk:
        """Go block by block; the border is decided before it could be read wrongly."""
        return block_walk(traits, Reuse(self.cache), first_only=True, keeps_border=True)

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """Scores are those of the filtered distribution, also where the best token is taken."""
        return Transform(filtered_confidence=True, filters_greedy=True, top_p_first=True)

    def check(self, *, block_length: int, num_blocks: int, is_bidirectional: bool) -> None:
        """The steps must divide over the blocks."""
        require_bidirectional("cache", self.cache, is_bidirectional)
        require_whole_steps(self.steps, num_blocks)

    @staticmethod
    def decide(
        rows: Sequence[FastDLLMDream], view: View, statistics: Statistics, states: Sequence[Any]
    ) -> Outcome:
        """Take the first position in a block's first step, later by threshold or schedule."""
        confidence, entropy = statistics.confidence, statistics.entropy
        by_confidence = per_row((row.alg == "confidence_threshold" for row in rows), view)[:, None]
        threshold = per_row((row.threshold for row in rows), view)[:, None]
        takes, score = confidence >= threshold, confidence
        if entropy is not None:
            takes = torch.where(by_confidence, takes, entropy < threshold)
            score = torch.where(by_confidence, score, -entropy)
        ranks = rank_descending(score, view.eligible)
        takes |= ranks == 0
        is_over = [False] * len(rows)
        for index, row in enumerate(rows):
            step = int(view.step[index])
            if row.alg == "entropy" and step:
                count, is_over[index] = _count(row, view, index, step)
                takes[index] = ranks[index] < count
        takes &= view.eligible
        # The first step looks at one position of several: whether the block is done shows on the canvas.
        is_full = (view.step > 0) & ~(view.eligible & ~takes).any(-1)
        is_alone = (view.step == 0) & (view.masks_at_start <= takes.sum(-1))
        return Outcome(
            transfer=takes, tokens=statistics.token, done=is_full | is_alone | per_row(is_over, view)
        )


def _count(row: FastDLLMDream, view: View, index: int, step: int) -> tuple[int, bool]:
    """Return how many positions one row's step decides, and whether its block ends there in any case."""
    num_steps = row.steps // view.num_blocks[index] if row.steps else view.block_length[index]
    num_eligible = int(view.eligible[index].sum())
    if row.is_reference and step == num_steps:
        return 0, True
    if step >= num_steps - 1:
        return num_eligible, False
    count = int(torch.tensor(num_eligible).float() * torch.tensor(shares(num_steps, row.eps)[step]))
    return (count if row.is_reference else max(1, count)), False
