"""Entropy-bounded renoising (DiffusionGemma; transformers' and diffusers' samplers, SGLang's Gemma4Renoise).

A canvas of random tokens is refined: in each step the positions of lowest entropy take a drawn token, as many
as a bound on their summed entropy allows, and all others show random tokens again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.core.spec import TextSpec
from sfumato.core.traits import ModelTraits
from sfumato.errors import RequestError
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
)
from sfumato.text.walk import Noise, RenoiseWalk, Walk, block_walk


@dataclass(frozen=True, slots=True)
class Guess:
    """What one canvas carries from step to step: its last best tokens i64[n, W], newest first, and the
    expected embeddings [W, width] under the last step.
    """

    history: Tensor
    soft_embedding: Tensor | None


@dataclass(frozen=True, slots=True)
class EntropyBound(Algorithm):
    """Each step accepts positions up to a bound of entropy; a block ends when its best tokens are stable.

    A request's temperature above 0 takes the place of t_max, with t_min in proportion.
    """

    max_denoising_steps: int = parameter(48, "steps per block at most", minimum=1)
    entropy_bound: float = parameter(
        0.1, "nats that the accepted positions but the last may have together", minimum=0.0
    )
    t_max: float = parameter(0.8, "temperature of the first step", minimum=1e-3)
    t_min: float = parameter(0.4, "temperature towards which the last step goes", minimum=1e-3)
    stability_threshold: int = parameter(
        1, "steps for which the best tokens must have stayed the same", minimum=0
    )
    confidence_threshold: float | None = parameter(
        0.005, "mean entropy in nats below which a stable block ends; null: never early", minimum=0.0
    )
    # Reference variant (diffusers): a block that ran out of steps keeps what it shows.
    keeps_canvas: bool = False

    is_monotone: ClassVar[bool] = False
    renoises: ClassVar[bool] = True
    # What a grammar left of a block's last step goes on being expected from.
    reads_decided: ClassVar[bool] = True
    decides_at_end: ClassVar[bool] = True

    @property
    def needs_vocabulary(self) -> bool:
        return True

    @property
    def wanted(self) -> Wanted:
        return Wanted(best=True, entropy=True, soft_embedding=True)

    def wanted_at(self, step: int) -> Wanted:
        """A block's last step has no successor to expect anything for, unless a grammar left some out."""
        return Wanted(best=True, entropy=True, soft_embedding=self._expects(step))

    def _expects(self, step: int) -> bool:
        return step + 1 != self.max_denoising_steps

    def walk(self, canvas: Canvas, spec: TextSpec, traits: ModelTraits) -> Walk:
        """Open blocks of random tokens and cool down."""
        asked, steps = spec.sampling.temperature, self.max_denoising_steps
        scale = asked / self.t_max if asked else 1.0
        span = self.t_max - self.t_min
        noises = tuple(Noise(scale * (self.t_min + span * (steps - step) / steps)) for step in range(steps))
        return RenoiseWalk(traits.vocab_size, noises, block_walk(traits))

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """Entropies are those of the distribution that a token is drawn from."""
        return Transform(filtered_confidence=True)

    def check(self, *, block_length: int, num_blocks: int, is_bidirectional: bool) -> None:
        """The temperature must not rise."""
        if self.t_min > self.t_max:
            raise RequestError(
                f"t_min {self.t_min} is above t_max {self.t_max}",
                field="algorithm_parameters.t_min",
                value=self.t_min,
                limit=self.t_max,
            )

    def addend(self, state: Any) -> Tensor | None:
        """Return what the step before expected."""
        guess: Guess | None = state
        return None if guess is None else guess.soft_embedding

    @staticmethod
    def decide(
        rows: Sequence[EntropyBound], view: View, statistics: Statistics, states: Sequence[Any]
    ) -> Outcome:
        """Accept by entropy, renoise the rest, and end what is stable and sure."""
        assert statistics.entropy is not None
        assert statistics.best is not None
        assert view.vocabulary is not None
        bound = per_row((row.entropy_bound for row in rows), view)
        accepted = accept(statistics.entropy, view.eligible, bound)
        renoised = torch.where(accepted, statistics.token, view.vocabulary)
        mean = (statistics.entropy * view.eligible).sum(-1) / view.eligible.sum(-1).clamp(min=1)
        done, keeps = [], []
        for index, (row, state) in enumerate(zip(rows, states, strict=True)):
            is_last = int(view.step[index]) + 1 >= row.max_denoising_steps
            is_sure = row.confidence_threshold is not None and float(mean[index]) < row.confidence_threshold
            is_early = is_sure and _is_stable(statistics.best[index], state, row.stability_threshold)
            done.append(is_last or is_early)
            keeps.append(row.keeps_canvas and not is_early)
        is_done = per_row(done, view)
        tokens = torch.where(per_row(keeps, view)[:, None], renoised, statistics.best)
        return Outcome(
            transfer=view.eligible & is_done[:, None],
            tokens=tokens,
            renoised=renoised,
            done=is_done,
            states=[
                _next_guess(
                    row, statistics, states[index], index, length, expects=row._expects(int(view.step[index]))
                )
                for index, (row, length) in enumerate(zip(rows, view.block_length, strict=True))
            ],
        )


def accept(entropy: Tensor, eligible: Tensor, bound: Tensor) -> Tensor:
    """Return bool[R, W]: positions by rising entropy while the sum before each is within its row's bound."""
    ordered, order = entropy.masked_fill(~eligible, torch.inf).sort(dim=-1, stable=True)
    before = ordered.masked_fill(ordered.isinf(), 0.0).cumsum(-1) - ordered.masked_fill(ordered.isinf(), 0.0)
    within = before <= bound[:, None]
    return torch.zeros_like(eligible).scatter_(-1, order, within) & eligible


def _is_stable(best: Tensor, state: Guess | None, demanded: int) -> bool:
    if not demanded:
        return True
    if state is None or len(state.history) < demanded:
        return False
    return bool((state.history[:demanded] == best[: state.history.shape[1]]).all())


def _next_guess(
    row: EntropyBound,
    statistics: Statistics,
    state: Guess | None,
    index: int,
    length: int,
    *,
    expects: bool,
) -> Guess:
    assert statistics.best is not None
    newest = statistics.best[index : index + 1, :length]
    before = newest[:0] if state is None else state.history
    history = torch.cat((newest, before))[: max(1, row.stability_threshold)]
    soft = statistics.soft_embedding
    # A neighbour's wish is not this row's.
    soft = soft[index, :length] if soft is not None and expects else None
    return Guess(history=history, soft_embedding=soft)
