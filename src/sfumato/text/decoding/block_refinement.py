"""Block refinement (diffusers' BlockRefinementScheduler with a mask token): schedule, threshold, edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sfumato.errors import RequestError
from sfumato.text.decoding.protocol import (
    Algorithm,
    Outcome,
    Statistics,
    Transform,
    View,
    counts,
    parameter,
    per_row,
)
from sfumato.text.decoding.ranking import rank_descending, scheduled_count


@dataclass(frozen=True, slots=True)
class BlockRefinement(Algorithm):
    """Each step decides all above a threshold if they are as many as scheduled, else the scheduled number.

    The state is the number of steps without masks. Served, a block ends with its last mask, or with the last
    edit; the reference looks for masks before a step, and may leave some where its steps are used up.
    """

    threshold: float = parameter(0.7, "positions more confident than this are decided together", minimum=0.0)
    editing_threshold: float | None = parameter(
        None,
        "a decided token is replaced by a better one of more than this confidence; null: never",
        minimum=0.0,
    )
    num_inference_steps: int | None = parameter(
        None, "steps per block that the schedule plans for; default one token per step", minimum=1
    )
    max_post_steps: int = parameter(16, "steps per block after its last mask", minimum=0)
    # Reference variant: the loop's own end of a block.
    is_reference: bool = False
    # Reference variant: the step function alone, whose caller ends a block.
    never_ends: bool = False

    is_monotone: ClassVar[bool] = False
    reads_decided: ClassVar[bool] = True
    runs_ahead: ClassVar[bool] = True

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """The confidence is that of the distribution a token is drawn from."""
        return Transform(filtered_confidence=True)

    def check(self, *, block_length: int, num_blocks: int, is_bidirectional: bool) -> None:
        """More steps than positions would schedule empty steps."""
        if self.num_inference_steps is not None and self.num_inference_steps > block_length:
            raise RequestError(
                f"num_inference_steps {self.num_inference_steps} is more than block_length {block_length}",
                field="algorithm_parameters.num_inference_steps",
                value=self.num_inference_steps,
                limit=block_length,
            )

    @staticmethod
    def decide(
        rows: Sequence[BlockRefinement], view: View, statistics: Statistics, states: Sequence[Any]
    ) -> Outcome:
        """Choose masks by threshold or schedule, and edits."""
        confidence, token = statistics.confidence, statistics.token
        lengths = per_row(view.block_length, view)
        steps = per_row(
            (row.num_inference_steps or length for row, length in zip(rows, view.block_length, strict=True)),
            view,
        )
        count = scheduled_count(lengths, steps, torch.minimum(view.step, steps - 1))
        threshold = per_row((row.threshold for row in rows), view)[:, None]
        above = (confidence > threshold) & view.eligible
        ranked = (rank_descending(confidence, view.eligible) < count[:, None]) & view.eligible
        chosen = torch.where((above.sum(-1) >= count)[:, None], above, ranked)
        limit = per_row(
            (float("inf") if row.editing_threshold is None else row.editing_threshold for row in rows), view
        )
        edits = (confidence > limit[:, None]) & view.editable & (token != view.token_ids)
        transfer = chosen | edits
        had_masks = view.eligible.any(-1)
        post_steps = counts(states, view) + (~had_masks).long()
        is_over = (
            ~limit.isfinite()
            | ~edits.any(-1)
            | (post_steps > per_row((row.max_post_steps for row in rows), view))
        )
        has_masks = (view.eligible & ~transfer).any(-1)
        is_reference = per_row((row.is_reference for row in rows), view)
        done = torch.where(
            is_reference,
            torch.where(had_masks, view.step + 1 >= steps, is_over),
            ~has_masks & is_over & ~(had_masks & limit.isfinite()),
        )
        done &= ~per_row((row.never_ends for row in rows), view)
        return Outcome(transfer=transfer, tokens=token, done=done, states=post_steps.unbind())
