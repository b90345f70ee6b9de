"""LLaDA's scheduled low-confidence remasking (arXiv:2502.09992, algorithm 5; `generate.py` of ML-GSAI/LLaDA).

Served, a block ends when its last position is decided; the reference goes on until its steps are used up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sfumato.text.decoding.protocol import (
    Algorithm,
    Outcome,
    Statistics,
    Transform,
    View,
    parameter,
    per_row,
    planned_steps,
    require_bidirectional,
    require_whole_steps,
)
from sfumato.text.decoding.ranking import scheduled_count, top_positions


@dataclass(frozen=True, slots=True)
class LLaDA(Algorithm):
    """Each step decides a scheduled number of positions, the most confident (or random) ones first."""

    steps: int | None = parameter(
        None,
        "denoise steps over the whole canvas; a multiple of its blocks; default one token per step",
        minimum=1,
    )
    remasking: str = parameter(
        "low_confidence", "which positions stay masked", choices=("low_confidence", "random")
    )
    cfg_scale: float = parameter(0.0, "classifier-free guidance; 0 is off", minimum=0.0, maximum=100.0)
    logits_eos_inf: bool = parameter(False, "never choose the end token")
    confidence_eos_eot_inf: bool = parameter(False, "decide end tokens last")
    # Reference variant: every step of the schedule is run, also with nothing left to decide.
    is_reference: bool = False
    # Reference variant: at temperatures above 0 only the end-of-turn token loses its confidence.
    spares_eos: bool = False

    runs_ahead: ClassVar[bool] = True

    @property
    def scheduled_steps(self) -> int | None:
        return self.steps

    @property
    def needs_uniform(self) -> bool:
        return self.remasking == "random"

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """EOS is the first end token; the end-of-turn token joins it where the model has one."""
        eos = ends[:1]
        turn = () if eot is None else (eot,)
        last = turn if self.spares_eos else tuple(dict.fromkeys((*eos, *turn)))
        return Transform(
            guidance_scale=self.cfg_scale,
            excluded_ids=eos if self.logits_eos_inf else (),
            confidence_excluded_ids=last if self.confidence_eos_eot_inf else (),
        )

    def check(self, *, block_length: int, num_blocks: int, is_bidirectional: bool) -> None:
        """The steps must divide over the blocks; guidance needs a model without an exact cache."""
        require_whole_steps(self.steps, num_blocks)
        if self.cfg_scale:
            require_bidirectional("cfg_scale", self.cfg_scale, is_bidirectional)

    @staticmethod
    def decide(rows: Sequence[LLaDA], view: View, statistics: Statistics, states: Sequence[Any]) -> Outcome:
        """Take the scheduled number of undecided positions."""
        steps = planned_steps(rows, view)
        score = statistics.confidence
        if view.uniform is not None:
            is_random = per_row([row.needs_uniform for row in rows], view)
            score = torch.where(is_random[:, None], view.uniform, score)
        count = scheduled_count(view.masks_at_start, steps, view.step)
        transfer = top_positions(score, view.eligible, count)
        done = None
        if any(row.is_reference for row in rows):
            is_reference = per_row([row.is_reference for row in rows], view)
            is_decided = ~(view.eligible & ~transfer).any(-1)
            done = torch.where(is_reference, view.step + 1 >= steps, is_decided)
        return Outcome(transfer=transfer, tokens=statistics.token, done=done)
