"""Block refinement without a mask token (diffusers' BlockRefinementScheduler with mask_token_id None).

A schedule says how many positions are decided after each step; the others show fresh random tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sfumato.core.spec import TextSpec
from sfumato.core.traits import ModelTraits
from sfumato.text.canvas import Canvas
from sfumato.text.decoding.protocol import (
    Algorithm,
    Outcome,
    Statistics,
    Transform,
    View,
    Wanted,
    parameter,
    per_row,
    soft_states,
)
from sfumato.text.decoding.ranking import rank_descending
from sfumato.text.walk import RenoiseWalk, Walk, block_walk


@dataclass(frozen=True, slots=True)
class UniformRefinement(Algorithm):
    """Each step decides what is confident, and as many positions as the schedule asks for."""

    num_inference_steps: int = parameter(32, "steps per block", minimum=1)
    threshold: float = parameter(0.9, "positions more confident than this are decided", minimum=0.0)
    editing_threshold: float | None = parameter(
        None,
        "a decided token is replaced by a better one of more than this confidence; null: never",
        minimum=0.0,
    )
    # Reference variant: all steps are run, also with nothing left to decide.
    is_reference: bool = False

    is_monotone: ClassVar[bool] = False
    reads_decided: ClassVar[bool] = True
    renoises: ClassVar[bool] = True

    @property
    def needs_vocabulary(self) -> bool:
        return True

    @property
    def wanted(self) -> Wanted:
        return Wanted(soft_embedding=True)

    def addend(self, state: Any) -> Tensor | None:
        """Return what the step before expected."""
        expected: Tensor | None = state
        return expected

    def walk(self, canvas: Canvas, spec: TextSpec, traits: ModelTraits) -> Walk:
        """Open blocks of random tokens."""
        return RenoiseWalk(traits.vocab_size, (), block_walk(traits))

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """The confidence is that of the distribution a token is drawn from."""
        return Transform(filtered_confidence=True)

    @staticmethod
    def decide(
        rows: Sequence[UniformRefinement], view: View, statistics: Statistics, states: Sequence[Any]
    ) -> Outcome:
        """Rank the undecided positions, edit the decided ones, renoise the rest."""
        assert view.vocabulary is not None
        confidence, token = statistics.confidence, statistics.token
        steps = per_row((row.num_inference_steps for row in rows), view)
        planned = ((view.step + 1) * view.masks_at_start + steps - 1) // steps
        needed = (planned - (view.masks_at_start - view.eligible.sum(-1))).clamp(min=0)
        threshold = per_row((row.threshold for row in rows), view)[:, None]
        chosen = (rank_descending(confidence, view.eligible) < needed[:, None]) | (confidence > threshold)
        limit = per_row(
            (float("inf") if row.editing_threshold is None else row.editing_threshold for row in rows), view
        )
        edits = (confidence > limit[:, None]) & view.editable & (token != view.token_ids)
        transfer = (chosen & view.eligible) | edits
        is_decided = ~(view.eligible & ~transfer).any(-1)
        is_early = is_decided & ~limit.isfinite()
        is_reference = per_row((row.is_reference for row in rows), view)
        done = (view.step + 1 >= steps) | (is_early & ~is_reference)
        return Outcome(
            transfer=transfer,
            tokens=token,
            renoised=view.vocabulary,
            done=done,
            states=soft_states(statistics, view),
        )
