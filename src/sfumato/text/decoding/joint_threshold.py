"""SGLang's JointThreshold (LLaDA2.1): masks become tokens, and tokens are edited while others decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
from sfumato.text.decoding.ranking import rank_descending


@dataclass(frozen=True, slots=True)
class JointThreshold(Algorithm):
    """Each step decides all above a threshold, else the best one, and replaces tokens it has come to doubt.

    The state is the number of steps without masks. A block ends on a step that changes nothing, or when such
    steps are used up.
    """

    threshold: float = parameter(0.5, "positions more confident than this are decided together", minimum=0.0)
    edit_threshold: float = parameter(
        0.0, "a decided token is replaced by a better one of more than this confidence", minimum=0.0
    )
    max_post_edit_steps: int = parameter(16, "steps per block after its last mask", minimum=0)
    penalty_lambda: float = parameter(
        0.0, "taken off the logit of the token on a position's left, against repetition", minimum=0.0
    )

    is_monotone: ClassVar[bool] = False
    reads_decided: ClassVar[bool] = True
    runs_ahead: ClassVar[bool] = True

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """The confidence is that of the distribution a token is drawn from."""
        return Transform(filtered_confidence=True, repeat_penalty=self.penalty_lambda)

    @staticmethod
    def decide(
        rows: Sequence[JointThreshold], view: View, statistics: Statistics, states: Sequence[Any]
    ) -> Outcome:
        """Choose masks and edits together; a row whose steps are used up changes nothing."""
        confidence, token = statistics.confidence, statistics.token
        threshold = per_row((row.threshold for row in rows), view)[:, None]
        chosen = (confidence > threshold) & view.eligible
        best = rank_descending(confidence, view.eligible) == 0
        chosen |= best & view.eligible & ~chosen.any(-1, keepdim=True)
        edit_threshold = per_row((row.edit_threshold for row in rows), view)[:, None]
        edits = (confidence > edit_threshold) & view.editable & (token != view.token_ids)
        has_masks = view.eligible.any(-1)
        post_steps = counts(states, view) + (~has_masks).long()
        limit = per_row((row.max_post_edit_steps for row in rows), view)
        is_over = ~has_masks & (post_steps > limit)
        transfer = (chosen | edits) & ~is_over[:, None]
        # With no step left after the last mask, the one that would only find that out is not run.
        is_last = (limit == 0) & ~(view.eligible & ~transfer).any(-1)
        done = is_over | ~transfer.any(-1) | is_last
        return Outcome(transfer=transfer, tokens=token, done=done, states=post_steps.unbind())
