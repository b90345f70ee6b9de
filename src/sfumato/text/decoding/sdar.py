"""SDAR's block decoding (arXiv:2510.06303; `generate.py` of JetAstra/SDAR): static, dynamic, sequential.

Served, a step never rewrites a decided position; the reference's top-k does when fewer masks remain than
its schedule wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sfumato.errors import RequestError
from sfumato.text.decoding.protocol import Algorithm, Outcome, Statistics, Transform, View, parameter, per_row
from sfumato.text.decoding.ranking import rank_descending, scheduled_count

STRATEGIES = ("low_confidence_static", "low_confidence_dynamic", "sequential")


@dataclass(frozen=True, slots=True)
class SDAR(Algorithm):
    """Each step decides a scheduled number of positions, more of them where they are confident enough."""

    remasking_strategy: str = parameter(
        "low_confidence_dynamic", "how the positions of a step are chosen", choices=STRATEGIES
    )
    confidence_threshold: float = parameter(
        0.85, "dynamic: positions more confident than this go together", minimum=0.0
    )
    denoising_steps: int | None = parameter(
        None, "steps per block that the schedule plans for; default one token per step", minimum=1
    )

    runs_ahead: ClassVar[bool] = True

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """The confidence is that of the distribution a token is drawn from."""
        return Transform(filtered_confidence=True)

    def check(self, *, block_length: int, num_blocks: int, is_bidirectional: bool) -> None:
        """More steps than positions would schedule empty steps."""
        if self.denoising_steps is not None and self.denoising_steps > block_length:
            raise RequestError(
                f"denoising_steps {self.denoising_steps} is more than the block length {block_length}",
                field="algorithm_parameters.denoising_steps",
                value=self.denoising_steps,
                limit=block_length,
            )

    @staticmethod
    def decide(rows: Sequence[SDAR], view: View, statistics: Statistics, states: Sequence[Any]) -> Outcome:
        """Take the scheduled number by rank or position, or all above the threshold where they are more."""
        lengths = per_row(view.block_length, view)
        num_steps = per_row(
            (row.denoising_steps or length for row, length in zip(rows, view.block_length, strict=True)), view
        )
        count = scheduled_count(lengths, num_steps, view.step).clamp(min=1)
        by_rank = rank_descending(statistics.confidence, view.eligible)
        by_position = view.eligible.long().cumsum(-1) - 1
        is_sequential = per_row([row.remasking_strategy == "sequential" for row in rows], view)
        order = torch.where(is_sequential[:, None], by_position, by_rank)
        threshold = per_row([row.confidence_threshold for row in rows], view)
        above = (statistics.confidence > threshold[:, None]) & view.eligible
        is_dynamic = per_row((row.remasking_strategy == "low_confidence_dynamic" for row in rows), view)
        takes_above = is_dynamic & (above.sum(-1) >= count)
        transfer = torch.where(takes_above[:, None], above, order < count[:, None]) & view.eligible
        return Outcome(transfer=transfer, tokens=statistics.token)
