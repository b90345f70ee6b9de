"""SGLang's LowConfidence step (LLaDA2.0, SDAR): all strictly above a threshold, or the best one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sfumato.text.decoding.protocol import Algorithm, Outcome, Statistics, Transform, View, parameter, per_row
from sfumato.text.decoding.ranking import rank_descending


@dataclass(frozen=True, slots=True)
class LowConfidence(Algorithm):
    """Each step decides every position whose confidence is above the threshold, else the single best one."""

    threshold: float = parameter(0.95, "positions more confident than this are decided together", minimum=0.0)
    max_steps: int | None = parameter(None, "steps per block; the last one decides what is left", minimum=1)

    runs_ahead: ClassVar[bool] = True

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """The confidence is that of the distribution a token is drawn from."""
        return Transform(filtered_confidence=True)

    @staticmethod
    def decide(
        rows: Sequence[LowConfidence], view: View, statistics: Statistics, states: Sequence[Any]
    ) -> Outcome:
        """Compare with the threshold; the best undecided position always goes."""
        threshold = per_row([row.threshold for row in rows], view)
        ranks = rank_descending(statistics.confidence, view.eligible)
        caps = per_row([row.max_steps or 0 for row in rows], view)
        is_last = (caps > 0) & (view.step + 1 >= caps)
        above = (statistics.confidence > threshold[:, None]) | is_last[:, None]
        return Outcome(transfer=(above | (ranks == 0)) & view.eligible, tokens=statistics.token)
