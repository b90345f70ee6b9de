"""Fast-dLLM v2's decoding (arXiv:2509.26328; `generate` of the published model class).

A block's first token comes from the state in front of it and is decided alone, in the forward that commits
the block before; then sub-blocks follow from left to right, each by a confidence threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sfumato.core.spec import TextSpec
from sfumato.core.traits import ModelTraits
from sfumato.errors import NotSupported
from sfumato.text.canvas import Canvas
from sfumato.text.decoding.protocol import (
    Algorithm,
    Outcome,
    Statistics,
    Transform,
    View,
    parameter,
    per_row,
)
from sfumato.text.decoding.ranking import rank_descending
from sfumato.text.walk import Walk, block_walk


@dataclass(frozen=True, slots=True)
class FastDLLMV2(Algorithm):
    """Each step decides the best position of the first open sub-block and all above a threshold there."""

    threshold: float = parameter(0.9, "positions more confident than this are decided together", minimum=0.0)
    small_block_size: int = parameter(8, "positions of a sub-block", minimum=1)

    runs_ahead: ClassVar[bool] = True

    def walk(self, canvas: Canvas, spec: TextSpec, traits: ModelTraits) -> Walk:
        """Go block by block; the first position goes first where it is open."""
        if not traits.shifts_logits:
            raise NotSupported(
                "algorithm 'fast_dllm_v2' needs a model with shifted logits",
                field="algorithm",
                value="fast_dllm_v2",
            )
        return block_walk(traits, first_only=True)

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """The confidence is that of the distribution a token is drawn from."""
        return Transform(filtered_confidence=True)

    @staticmethod
    def decide(
        rows: Sequence[FastDLLMV2], view: View, statistics: Statistics, states: Sequence[Any]
    ) -> Outcome:
        """Look at one sub-block of each row."""
        width = view.eligible.shape[1]
        sizes = per_row((row.small_block_size for row in rows), view)
        sub_block = torch.arange(width, device=view.step.device) // sizes[:, None]
        beyond = sub_block.amax() + 1
        first = torch.where(view.eligible, sub_block, beyond).amin(-1, keepdim=True)
        eligible = view.eligible & (sub_block == first)
        threshold = per_row((row.threshold for row in rows), view)[:, None]
        takes = (statistics.confidence > threshold) | (rank_descending(statistics.confidence, eligible) == 0)
        transfer = takes & eligible
        # The first step may have been shown one position of several.
        num_open = torch.where(view.step == 0, view.masks_at_start, view.eligible.sum(-1))
        return Outcome(transfer=transfer, tokens=statistics.token, done=transfer.sum(-1) >= num_open)
