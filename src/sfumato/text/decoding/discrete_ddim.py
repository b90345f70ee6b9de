"""Discrete DDIM (arXiv:2010.02502, appendix; diffusers' DiscreteDDIMScheduler), with corrector steps.

In each step every position takes the guess, keeps its token or shows a random one, by the noise level; a
corrector step draws those tokens anew that the model doubts most, each judged without its own vote.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
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
    soft_states,
)
from sfumato.text.walk import Noise, RenoiseWalk, Walk, block_walk

_CLEAN, _STAY, _NOISE = range(3)


@dataclass(frozen=True, slots=True)
class DiscreteDDIM(Algorithm):
    """A fixed number of steps, in each of which every position of the block may change."""

    num_inference_steps: int = parameter(32, "steps per block", minimum=1)
    corrector_steps: int = parameter(0, "corrector forwards behind each step but the last", minimum=0)
    corrector_k: int = parameter(1, "positions that a corrector forward draws anew", minimum=1)
    corrector_temperature: float = parameter(1.0, "randomness of the choice of those positions", minimum=1e-3)

    is_monotone: ClassVar[bool] = False
    renoises: ClassVar[bool] = True
    # What a grammar left of a block's last step goes on being expected from.
    reads_decided: ClassVar[bool] = True
    decides_at_end: ClassVar[bool] = True

    @property
    def needs_uniform(self) -> bool:
        return True

    @property
    def needs_vocabulary(self) -> bool:
        return True

    @property
    def wanted(self) -> Wanted:
        return Wanted(top=2, soft_embedding=True)

    def addend(self, state: Any) -> Tensor | None:
        """Return what the step before expected."""
        expected: Tensor | None = state
        return expected

    def walk(self, canvas: Canvas, spec: TextSpec, traits: ModelTraits) -> Walk:
        """Open blocks of random tokens; corrector steps draw from a posterior without a token's own vote."""
        noises = []
        for step in range(self._num_forwards()):
            index, phase = divmod(step, 1 + self.corrector_steps)
            level = (index + 1) / self.num_inference_steps
            penalty = math.log1p(traits.vocab_size * level / (1 - level)) if phase else 0.0
            noises.append(Noise(1.0, penalty, 1 - level) if phase else Noise())
        return RenoiseWalk(traits.vocab_size, tuple(noises), block_walk(traits))

    def _num_forwards(self) -> int:
        return self.num_inference_steps * (1 + self.corrector_steps) - self.corrector_steps

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """The confidence is that of the distribution a token is drawn from."""
        return Transform(filtered_confidence=True)

    def asked_ids(self, token_ids: NDArray[np.int64], state: Any) -> NDArray[np.int64] | None:
        """Ask about the tokens that are shown."""
        return token_ids[:, None] if self.corrector_steps else None

    @staticmethod
    def decide(
        rows: Sequence[DiscreteDDIM], view: View, statistics: Statistics, states: Sequence[Any]
    ) -> Outcome:
        """Let each row take its step or its correction."""
        renoised = view.token_ids.clone()
        done = torch.zeros_like(view.step, dtype=torch.bool)
        for index, row in enumerate(rows):
            # Where a grammar left some of the last step out, that step is taken again.
            step = min(int(view.step[index]), row._num_forwards() - 1)
            turn, phase = divmod(step, 1 + row.corrector_steps)
            if phase:
                renoised[index] = _corrected(row, view, statistics, index)
            else:
                renoised[index] = _stepped(row, view, statistics, index, turn)
            done[index] = step + 1 >= row._num_forwards()
        return Outcome(
            transfer=view.eligible & done[:, None],
            tokens=renoised,
            renoised=renoised,
            done=done,
            states=soft_states(statistics, view),
        )


def _stepped(row: DiscreteDDIM, view: View, statistics: Statistics, index: int, turn: int) -> Tensor:
    """Return i64[W]: the guess, the token as it is or a random one, with diffusers' weights.

    a_t and a_s are the shares of signal before and behind the step, r their ratio, K the vocabulary.
    """
    assert view.vocabulary is not None
    assert view.uniform is not None
    a_t, a_s = turn / row.num_inference_steps, (turn + 1) / row.num_inference_steps
    ratio, size = a_t / a_s, view.vocab_size
    guess, shown = statistics.token[index], view.token_ids[index]
    clean = a_s * (1 - ratio) / size + ratio * a_s * (shown == guess).float()
    stay = torch.full_like(clean, ratio * (1 - a_s) / size)
    noise = torch.full_like(clean, (1 - ratio) * (1 - a_s) / size)
    total = clean + stay + noise
    drawn = view.uniform[index] * total
    route = torch.where(drawn < clean, _CLEAN, torch.where(drawn < clean + stay, _STAY, _NOISE))
    if view.routes is not None:
        route = torch.where(view.routes[index] >= 0, view.routes[index], route)
    random = view.vocabulary[index]
    return torch.where(route == _CLEAN, guess, torch.where(route == _STAY, shown, random))


def _corrected(row: DiscreteDDIM, view: View, statistics: Statistics, index: int) -> Tensor:
    """Return i64[W] with the k positions drawn anew whose token lags most behind its best rival."""
    assert statistics.asked_logprobs is not None
    assert statistics.top_ids is not None
    assert statistics.top_probabilities is not None
    assert view.uniform is not None
    shown = view.token_ids[index]
    is_own = statistics.top_ids[index, :, 0] == shown
    rival = torch.where(
        is_own, statistics.top_probabilities[index, :, 1], statistics.top_probabilities[index, :, 0]
    )
    margin = statistics.asked_logprobs[index, :, 0] - rival.log()
    chance = -torch.log(-torch.log(view.uniform[index].clamp(1e-7, 1 - 1e-7)))
    score = (-margin / row.corrector_temperature + chance).masked_fill(~view.eligible[index], -torch.inf)
    chosen = score.topk(min(row.corrector_k, score.shape[0])).indices
    corrected = shown.clone()
    corrected[chosen] = statistics.token[index][chosen]
    return torch.where(view.eligible[index], corrected, shown)
