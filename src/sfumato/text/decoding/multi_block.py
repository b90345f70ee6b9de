"""The walk of d3LLM (arXiv:2601.07568): blocks open one by one and are all decoded at once.

Which blocks are open, what is fed and whose keys are reused; the choice of positions is `d3llm.py`'s. The two
published loops (`generate_multi_block*` for LLaDA and for Dream in hao-ai-lab/d3LLM) differ in details, which
`MultiBlockRules` names; the served form recounts masks from the canvas and ends cleanly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sfumato.cache.approximate import Feed
from sfumato.core.plan import Decision
from sfumato.text.canvas import Canvas
from sfumato.text.walk import Round, Walk


@dataclass(frozen=True, slots=True)
class MultiBlockRules:
    """How blocks open and how their keys are cached.

    add_threshold: progress of the newest block from which the next opens. decoded_threshold: progress of a
    block from which its successor is guaranteed progress. cache_delay: rounds between a block's last decision
    and its entry into the cache; None: no cache. refresh_interval: rounds between refreshes.
    stop_ids: tokens behind which nothing is decoded; empty: no early stop. border: as in `feed_of`.
    reference: "" for what is served, else whose loop is repeated with its oddities, "llada" or "dream".
    """

    block_length: int
    add_threshold: float
    decoded_threshold: float
    cache_delay: int | None = None
    refresh_interval: int = 10_000
    stop_ids: frozenset[int] = frozenset()
    border: int = 0
    reference: str = ""


@dataclass(slots=True)
class Block:
    """A span that is open; is_active: it is guaranteed progress. completed_at: round that saw it complete."""

    start: int
    end: int
    masks: int
    is_active: bool
    completed_at: int | None = None
    is_cached: bool = False

    @property
    def progress(self) -> float:
        """Return the share that is decided."""
        return 1.0 - self.masks / (self.end - self.start) if self.end > self.start else 1.0


@dataclass(slots=True)
class MultiBlockWalk(Walk):
    """Implements `Walk`; blocks[0] is the prompt.

    cached: leading positions whose keys are kept, in `held` slots: more slots than positions once a refresh
    has kept keys beyond them (a reference's oddity, which then sees those positions twice).
    """

    # Keys of a block's neighbours are as old as their last refresh.
    begins_anew: ClassVar[bool] = False

    rules: MultiBlockRules
    prompt_len: int
    length: int
    blocks: list[Block] = field(default_factory=list)
    rounds: int = 0
    cached: int = 0
    held: int = 0
    has_cache: bool = False

    @property
    def uses_slots(self) -> bool:
        """Whether blocks are cached at all."""
        return self.rules.cache_delay is not None

    @property
    def extra_slots(self) -> int:
        """Return room for positions that are held twice."""
        return self.length if self.uses_slots and self.rules.reference == "dream" else 0

    @property
    def num_blocks(self) -> int:
        """Return how many blocks there will be; a reference without a cache leaves a shorter last one out."""
        whole, rest = divmod(self.length - self.prompt_len, self.rules.block_length)
        is_left_out = self.rules.reference == "llada" or (self.rules.reference and not self.uses_slots)
        return whole + (rest > 0 and not is_left_out)

    def next_round(self, canvas: Canvas) -> Round | None:
        """Open blocks, choose what is fed and what may be decided; None when all is decided."""
        if not self.blocks:
            self.blocks.append(Block(0, self.prompt_len, 0, is_active=True, completed_at=0))
            self._add(canvas, 1.0)
        was_open = canvas.undecided.copy()
        generated = canvas.undecided[self.prompt_len :]
        if not generated.any() and len(self.blocks) > self.num_blocks:
            return None
        self.rounds += 1
        has_stopped = self._stop_early(canvas)
        if has_stopped and not generated.any():
            return None
        self._open_blocks(canvas, has_stopped)
        active_end = max(block.end for block in self.blocks if block.is_active or block.masks > 0)
        choice = self._choose_feed(active_end)
        if choice is None:
            return None
        feed, is_kept = choice
        eligible = was_open if self.rules.reference else canvas.undecided.copy()
        eligible[active_end:] = False
        eligible[: feed.start + feed.border] = False
        start = int(eligible.argmax()) if eligible.any() else self.prompt_len
        focus = next((block for block in self.blocks if block.is_active and block.masks > 0), None)
        return Round(
            feed,
            start,
            max(start, active_end),
            eligible[start : max(start, active_end)],
            focus=(focus.start, focus.end) if focus else (0, 0),
            is_kept=is_kept,
        )

    def settle(self, canvas: Canvas, decision: Decision, chosen: NDArray[np.int64]) -> bool:
        """Count what was decided."""
        for block in self.blocks[1:]:
            num = int(((chosen >= block.start) & (chosen < block.end)).sum())
            if not self.rules.reference:
                block.masks = int(canvas.undecided[block.start : block.end].sum())
            elif self.rules.reference == "llada" and self.uses_slots:
                block.masks = max(0, block.masks - num)
            elif self.rules.reference == "dream" or block.masks > 0:
                block.masks -= num
        return False

    def _add(self, canvas: Canvas, progress: float) -> None:
        """Open the next block behind one of this progress."""
        start = self.blocks[-1].end
        end = min(start + self.rules.block_length, self.length)
        masks = int(canvas.undecided[start:end].sum())
        self.blocks.append(Block(start, end, masks, is_active=progress >= self.rules.decoded_threshold))

    def _open_blocks(self, canvas: Canvas, has_stopped: bool) -> None:
        for before, block in zip(self.blocks, self.blocks[1:], strict=False):
            block.is_active = block.is_active or before.progress >= self.rules.decoded_threshold
        if has_stopped:
            return
        while len(self.blocks) <= self.num_blocks:
            last = self.blocks[-1]
            if last.progress < self.rules.add_threshold and last.masks > 0:
                return
            self._add(canvas, last.progress)
            if self.rules.reference:
                # At most one a round.
                return

    def _stop_early(self, canvas: Canvas) -> bool:
        """Fill everything behind the first end token with it, and recount."""
        if not self.rules.stop_ids:
            return False
        is_end = np.isin(canvas.token_ids[self.prompt_len :], list(self.rules.stop_ids))
        is_end &= ~canvas.undecided[self.prompt_len :]
        if not is_end.any():
            return False
        first = self.prompt_len + int(is_end.argmax())
        behind = slice(first + 1, None)
        is_free = ~canvas.pinned[behind]
        canvas.token_ids[behind][is_free] = canvas.token_ids[first]
        canvas.undecided[behind] = False
        if self.rules.reference == "llada":
            self._recount_around(canvas, first)
        else:
            self._recount(canvas, first)
        return True

    def _recount(self, canvas: Canvas, first: int) -> None:
        """Recount all blocks, and open those that were not yet."""
        for block in self.blocks[1:]:
            masks = int(canvas.undecided[block.start : block.end].sum())
            block.is_active = block.is_active or (masks == 0 and block.masks != 0)
            block.masks = masks
            block.is_cached = block.is_cached or (self.uses_slots and block.start > first)
        while len(self.blocks) <= self.num_blocks:
            self._add(canvas, 1.0)
            self.blocks[-1].is_active, self.blocks[-1].is_cached = True, self.uses_slots

    def _recount_around(self, canvas: Canvas, first: int) -> None:
        """Recount the block that holds the end token, close those behind it, open the missing ones there."""
        for block in self.blocks[1:]:
            if block.start > first:
                masks = 0
            elif first < block.end:
                masks = int(canvas.undecided[block.start : first + 1].sum())
            else:
                continue
            if masks != block.masks:
                block.masks = masks
                block.is_active = block.is_active or masks == 0
        while len(self.blocks) <= self.num_blocks and self.blocks[-1].end > first:
            self._add(canvas, 1.0)
            added = self.blocks[-1]
            added.masks, added.is_active = 0, True
            if self.uses_slots:
                added.completed_at, added.is_cached = self.rounds, True

    def _choose_feed(self, active_end: int) -> tuple[Feed, bool] | None:
        """Return what is fed and whether its keys are kept; None where nothing is left to do."""
        if not self.uses_slots:
            return Feed(0, self.length), False
        append = self._schedule() - self.cached
        settling = [block for block in self.blocks if block.masks <= 0 and block.completed_at is not None]
        settling = [block for block in settling if not block.is_cached]
        if self.rules.reference == "llada":
            busy = [block.start for block in self.blocks if block.masks > 0 or block in settling]
            if min([self.cached, *busy]) >= active_end:
                return None
        is_due = self.rounds % self.rules.refresh_interval == 0
        if append > 0 or (self.has_cache and not settling and not is_due):
            border = self.rules.border if self.cached else 0
            start, slot = self.cached - border, self.held - border
            feed = Feed(start, self.length, slot, slot + self.length - start, border)
            if append <= 0:
                return feed, False
            self.cached, self.held, self.has_cache = self.cached + append, self.held + append, True
            return feed, True
        if not self.has_cache:
            return Feed(0, self.length), False
        # What a refresh keeps beyond the cached positions would be seen twice; only a reference does that.
        self.held = self.cached
        if settling and self.rules.reference == "dream":
            self.held = settling[-1].start
        return Feed(0, self.length, slot=0, visible=self.length), True

    def _schedule(self) -> int:
        """Return the end of the last block that enters the cache now, strictly from left to right."""
        end = self.cached
        for block in self.blocks:
            if block.end <= self.cached:
                continue
            if block.masks > 0:
                break
            if block.completed_at is None:
                block.completed_at = self.rounds
            if self.rounds - block.completed_at >= (self.rules.cache_delay or 0):
                if not block.is_cached:
                    block.is_cached = True
                    end = block.end
            elif self.rules.reference != "dream":
                break
        return end
