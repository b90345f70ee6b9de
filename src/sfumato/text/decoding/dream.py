"""Dream's decoding of a whole canvas (arXiv:2508.15487; `generation_utils.py`, and Fast-dLLM's copy of it).

Served, a step decides at least one position, and the canvas ends with its last one; the reference spends all
scheduled forwards, some of them on nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.text.decoding.protocol import (
    Algorithm,
    Outcome,
    Statistics,
    Transform,
    View,
    Wanted,
    parameter,
    per_row,
    require_bidirectional,
)
from sfumato.text.decoding.ranking import rank_descending

SCORES = ("maskgit_plus", "topk_margin", "entropy", "confidence_threshold", "origin")


@lru_cache(maxsize=256)
def shares(steps: int, eps: float) -> tuple[float, ...]:
    """Return which share of the masks each step but the last decides, 1 - t[i + 1] / t[i], in float32."""
    times = torch.linspace(1, eps, steps + 1)
    return tuple((1 - times[1:] / times[:-1]).tolist())


@dataclass(frozen=True, slots=True)
class Dream(Algorithm):
    """Each step decides the best positions anywhere on the canvas, as many as a noise schedule says.

    The state of confidence_threshold is (positions per step, positions carried over, steps in all).
    """

    alg: str = parameter("entropy", "what makes a position good, or origin: chance", choices=SCORES)
    steps: int | None = parameter(
        None, "denoise steps over the whole canvas; default one token per step", minimum=1
    )
    eps: float = parameter(1e-3, "noise level at which the schedule ends", minimum=1e-6, maximum=0.5)
    threshold: float = parameter(
        0.9, "confidence_threshold: positions less confident than this wait for the next step", minimum=0.0
    )
    alg_temp: float = parameter(0.0, "randomness of the choice of positions; 0 takes the best", minimum=0.0)
    # Reference variant: every scheduled forward is spent, also with nothing to decide.
    is_reference: bool = False

    spans_canvas: ClassVar[bool] = True

    @property
    def scheduled_steps(self) -> int | None:
        return self.steps

    @property
    def needs_uniform(self) -> bool:
        return self.alg == "origin" or self.alg_temp > 0

    @property
    def wanted(self) -> Wanted:
        return Wanted(entropy=self.alg == "entropy", margin=self.alg == "topk_margin")

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """Scores are those of the filtered distribution, also where the best token is taken."""
        return Transform(filtered_confidence=True, filters_greedy=True, top_p_first=True)

    def check(self, *, block_length: int, num_blocks: int, is_bidirectional: bool) -> None:
        """All positions must see one another."""
        require_bidirectional("alg", self.alg, is_bidirectional)

    @staticmethod
    def decide(rows: Sequence[Dream], view: View, statistics: Statistics, states: Sequence[Any]) -> Outcome:
        """Rank the eligible positions and take the share of this step."""
        num_steps = [
            row.steps or int(masks) for row, masks in zip(rows, view.masks_at_start.tolist(), strict=True)
        ]
        score = _score(rows, view, statistics)
        ranks = rank_descending(score, view.eligible)
        count, chance = _shares(rows, view, num_steps)
        transfer = ranks < count[:, None]
        if any(row.alg == "origin" for row in rows) and view.uniform is not None:
            is_origin = per_row((row.alg == "origin" for row in rows), view)
            by_chance = view.uniform < chance[:, None]
            by_chance |= (ranks == 0) & ~per_row((row.is_reference for row in rows), view)[:, None]
            transfer = torch.where(is_origin[:, None], by_chance, transfer)
        new_states: list[Any] = [None] * len(rows)
        totals = list(num_steps)
        for index, row in enumerate(rows):
            if row.alg == "confidence_threshold":
                state = states[index] or (
                    int(view.masks_at_start[index]) // num_steps[index],
                    0,
                    totals[index],
                )
                transfer[index], new_states[index] = _by_threshold(
                    row, state, int(view.step[index]), ranks[index], score[index], view.eligible[index]
                )
                totals[index] = new_states[index][2]
        transfer &= view.eligible
        is_decided = ~(view.eligible & ~transfer).any(-1)
        is_reference = per_row((row.is_reference for row in rows), view)
        done = torch.where(is_reference, view.step + 1 >= per_row(totals, view), is_decided)
        return Outcome(transfer=transfer, tokens=statistics.token, done=done, states=new_states)


def _score(rows: Sequence[Dream], view: View, statistics: Statistics) -> Tensor:
    """Return f32[R, W], larger for better positions."""
    score = statistics.confidence
    if statistics.margin is not None:
        is_margin = per_row((row.alg == "topk_margin" for row in rows), view)
        score = torch.where(is_margin[:, None], statistics.margin, score)
    if statistics.entropy is not None:
        is_entropy = per_row((row.alg == "entropy" for row in rows), view)
        score = torch.where(is_entropy[:, None], -statistics.entropy, score)
    if view.uniform is not None and any(row.alg_temp for row in rows):
        temperature = per_row((row.alg_temp for row in rows), view)[:, None]
        noise = -torch.log(-torch.log(view.uniform.clamp(1e-7, 1 - 1e-7)))
        score = torch.where(temperature > 0, score / temperature.clamp(min=1e-6) + noise, score)
    return score


def _shares(rows: Sequence[Dream], view: View, num_steps: list[int]) -> tuple[Tensor, Tensor]:
    """Return how many positions each row's step decides i64[R], and the chance of each position f32[R]."""
    chances = []
    for row, steps, step in zip(rows, num_steps, view.step.tolist(), strict=True):
        chances.append(shares(steps, row.eps)[step] if step < steps - 1 else 1.0)
    chance = per_row(chances, view).float()
    num_eligible = view.eligible.sum(-1)
    count = (num_eligible.float() * chance).long()
    served = per_row((not row.is_reference for row in rows), view)
    return torch.where(served, count.clamp(min=1), count), chance


def _by_threshold(
    row: Dream, state: tuple[int, int, int], step: int, ranks: Tensor, score: Tensor, eligible: Tensor
) -> tuple[Tensor, tuple[int, int, int]]:
    """Return bool[W] for one row, and its new state: what failed the threshold is carried over."""
    quota, carried, total = state
    candidates = (ranks < max(1, quota + carried)) & eligible
    takes = candidates & ((score >= row.threshold) | (ranks == 0))
    if step + 1 < total:
        return takes, (quota, int((candidates & ~takes).sum()), total)
    left = int((eligible & ~takes).sum())
    return takes, (0, left, total + (left > 0))
