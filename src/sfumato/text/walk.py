"""Which positions of a canvas come next: one open block after another, or what an algorithm says itself.

Letters: L canvas positions, W window positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from sfumato.cache.approximate import Feed, Reuse, feed_of
from sfumato.core.plan import Decision
from sfumato.core.traits import ModelTraits
from sfumato.text.canvas import Canvas


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """One denoise step to come.

    feed: what the forward is given. start, stop: the window that the algorithm looks at. eligible: bool[W],
    positions that may be decided. focus: a span in which at least one position must be decided.
    is_kept: whether the fed keys will be seen by later steps. temperature: in place of the request's.
    own_penalty: taken off the logit of the token that each position shows. even_share: what of the
    probabilities is spread evenly over the vocabulary.
    """

    feed: Feed
    start: int
    stop: int
    eligible: NDArray[np.bool_]
    focus: tuple[int, int] = (0, 0)
    is_kept: bool = False
    temperature: float | None = None
    own_penalty: float = 0.0
    even_share: float = 0.0


class Walk(Protocol):
    """Plain state of one request: where its decoding stands on the canvas.

    begins_anew: a block's first step depends on the tokens of the canvas alone, not on how they came there.
    """

    begins_anew: ClassVar[bool] = True

    @property
    def uses_slots(self) -> bool:
        """Whether fed keys are kept from one step to the next, so that the request needs pages."""
        ...

    @property
    def extra_slots(self) -> int:
        """Return how many slots beyond the canvas's length it may need."""
        ...

    def next_round(self, canvas: Canvas) -> Round | None:
        """Return the next step, None when there is none; called once per step, and may change the canvas."""
        ...

    def again(self, canvas: Canvas, step: Round) -> Round | None:
        """Return the round behind `step` if that does not finish its block; eligible: all that may be open.

        None: it depends on what the step decides, or the block is sure to end.
        """
        return None

    def settle(self, canvas: Canvas, decision: Decision, chosen: NDArray[np.int64]) -> bool:
        """Take note of the canvas positions that were just decided; return whether a block was finished."""
        ...


@dataclass(slots=True)
class BlockWalk(Walk):
    """Opens one block after another; its keys are exact, or reused as `reuse` says.

    reuse None: the model's cache is exact, and only the open block is fed. border: see `feed_of`.
    first_only: the first step of a block may decide its first position alone (Fast-dLLM on Dream).
    """

    reuse: Reuse | None
    border: int = 0
    first_only: bool = False

    @property
    def uses_slots(self) -> bool:
        """Whether anything is reused."""
        return self.reuse is not Reuse.NOTHING

    @property
    def extra_slots(self) -> int:
        """None: every position has its own slot."""
        return 0

    def next_round(self, canvas: Canvas) -> Round | None:
        """Return a step on the open block."""
        if canvas.is_complete:
            return None
        start, stop = canvas.block_start, canvas.block_end
        if self.reuse is None:
            border = min(self.border, start)
            feed = Feed(start - border, stop, slot=start - border, border=border)
        else:
            feed = feed_of(
                self.reuse,
                length=canvas.length,
                block=(start, stop),
                is_first=canvas.step == 0,
                border=self.border,
            )
        eligible = canvas.undecided[start:stop].copy()
        if self.first_only and canvas.step == 0 and eligible[0]:
            eligible[1:] = False
        is_kept = self.uses_slots and self.reuse is not None and feed.is_fresh
        return Round(feed, start, stop, eligible, is_kept=is_kept)

    def again(self, canvas: Canvas, step: Round) -> Round | None:
        """Return the same feed; what old keys are seen depends on where the block ends."""
        undecided = canvas.undecided[step.start : step.stop]
        if self.reuse not in (None, Reuse.NOTHING) or np.count_nonzero(undecided) < 2:
            return None
        return replace(step, eligible=undecided.copy())

    def settle(self, canvas: Canvas, decision: Decision, chosen: NDArray[np.int64]) -> bool:
        """A block ends when the algorithm says so, else when nothing in it is undecided."""
        is_done = decision.done
        if is_done is None:
            is_done = not bool(canvas.undecided[canvas.block_start : canvas.block_end].any())
        if is_done:
            canvas.commit_block()
        return is_done


def block_walk(
    traits: ModelTraits, reuse: Reuse = Reuse.NOTHING, *, first_only: bool = False, keeps_border: bool = False
) -> BlockWalk:
    """Return a walk over the blocks of a model: with its exact cache, or reusing old keys.

    keeps_border: as references do, a cached slice begins with its own, wrong logits where they are shifted.
    """
    border = int(traits.shifts_logits and not keeps_border)
    return BlockWalk(None if traits.has_exact_cache else reuse, border, first_only)


@dataclass(frozen=True, slots=True)
class Noise:
    """What a step of a renoising algorithm does to the logits; see `Round`."""

    temperature: float | None = None
    own_penalty: float = 0.0
    even_share: float = 0.0


@dataclass(slots=True)
class RenoiseWalk(Walk):
    """Opens one block of random tokens after another, for models without a mask token.

    noises: of each step of a block; empty where there is none.
    """

    vocab_size: int
    noises: tuple[Noise, ...] = ()
    inner: BlockWalk = field(default_factory=lambda: BlockWalk(None))

    @property
    def uses_slots(self) -> bool:
        """Whether keys are kept."""
        return self.inner.uses_slots

    @property
    def extra_slots(self) -> int:
        """None: every position has its own slot."""
        return 0

    def next_round(self, canvas: Canvas) -> Round | None:
        """Return a step on the open block, whose first shows random tokens."""
        step = self.inner.next_round(canvas)
        if step is None:
            return None
        if canvas.step == 0:
            positions = step.start + np.flatnonzero(step.eligible)
            canvas.token_ids[positions] = canvas.random_source.vocabulary(
                canvas.block_index, -1, positions, self.vocab_size
            )
        if not self.noises:
            return step
        noise = self.noises[min(canvas.step, len(self.noises) - 1)]
        return replace(
            step,
            temperature=noise.temperature,
            own_penalty=noise.own_penalty,
            even_share=noise.even_share,
        )

    def settle(self, canvas: Canvas, decision: Decision, chosen: NDArray[np.int64]) -> bool:
        """End a block as any other."""
        return self.inner.settle(canvas, decision, chosen)
