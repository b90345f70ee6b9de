"""How keys and values of a request's tokens come to its pages, and what must be fed before it can denoise.

Letters: L canvas positions, B block length.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sfumato.cache.approximate import Feed, FeedLog
from sfumato.core.plan import Cost, Row, RowKind
from sfumato.core.request import Missing
from sfumato.text.canvas import Canvas
from sfumato.text.walk import Round


class Context(Protocol):
    """One request's cached context."""

    def missing(self, request_id: str, canvas: Canvas, step: Round | None) -> Missing | None:
        """Return what must be fed before the step, or None."""
        ...

    def riding_row(self, request_id: str, canvas: Canvas) -> Row | None:
        """Return a row that must ride in front of the step's own, or None."""
        ...

    def input_ids(self, row: Row, canvas: Canvas) -> NDArray[np.int64]:
        """Return the tokens i64[end - start] that a row feeds."""
        ...

    def note(self, row: Row) -> None:
        """Take note that a prefill or commit row has run."""
        ...

    def note_step(self, step: Round, canvas: Canvas) -> None:
        """Take note that a denoise step has run, before its decision is written."""
        ...

    def note_unchanged(self, end: int) -> None:
        """Take note that a block up to `end` was finished by a step that changed nothing in it."""
        ...

    def reset(self, cached_len: int) -> None:
        """Take the first cached_len positions' keys as present, and no others."""
        ...

    @property
    def cached_len(self) -> int:
        """Return how many leading positions have final keys and values."""
        ...


class ExactContext:
    """Keys of committed tokens never change: blocks are prefilled in order, and a commit rides on a step.

    granularity: 1 where the context is encoded token by token in a pass of its own, 0 for whole blocks.
    """

    def __init__(self, canvas: Canvas, granularity: int) -> None:
        self.cached_len = 0
        self._is_encoded = granularity == 1
        self._granularity = granularity or canvas.block_length
        # What lies in front of the first open block was never denoised and is prefilled.
        self._first_open = (
            canvas.origin + (canvas.prompt_len - canvas.origin) // canvas.block_length * canvas.block_length
        )

    def missing(self, request_id: str, canvas: Canvas, step: Round | None) -> Missing | None:
        """Return the known tokens without keys, but for one block that just came out of denoising."""
        num_missing = canvas.block_start - self.cached_len
        if not num_missing or canvas.is_complete:
            return None
        if num_missing == canvas.block_length and self.cached_len >= self._first_open:
            return None
        return Missing(self.cached_len, canvas.block_start, self._granularity)

    def riding_row(self, request_id: str, canvas: Canvas) -> Row | None:
        """Return the commit of the block that has just been denoised."""
        if self.cached_len >= canvas.block_start or canvas.is_complete:
            return None
        return _row(request_id, RowKind.COMMIT, self.cached_len, canvas.block_start)

    def input_ids(self, row: Row, canvas: Canvas) -> NDArray[np.int64]:
        """Return the canvas's tokens."""
        return canvas.token_ids[row.start : row.end]

    def note(self, row: Row) -> None:
        """Count the row's tokens as cached."""
        self.cached_len = max(self.cached_len, row.end)

    def note_step(self, step: Round, canvas: Canvas) -> None:
        """A step on open positions caches nothing."""

    def note_unchanged(self, end: int) -> None:
        """Such a step has written the block's final keys, unless they come from a pass of their own."""
        if not self._is_encoded:
            self.cached_len = max(self.cached_len, end)

    def reset(self, cached_len: int) -> None:
        """Continue with this many cached positions."""
        self.cached_len = cached_len


class StaleContext:
    """Keys of different ages, or none: what later steps still see is fed again after a retraction."""

    cached_len = 0

    def __init__(self) -> None:
        self._log = FeedLog()

    def missing(self, request_id: str, canvas: Canvas, step: Round | None) -> Missing | None:
        """Return the feeds to repeat, where a retraction took away keys that the step sees.

        Queries see the whole canvas, so that a feed cannot be cut.
        """
        lost = self._log.all_missing
        if step is None or step.feed.is_fresh or not lost:
            return None
        return Missing(feeds=tuple(_feed_row(request_id, feed) for feed, _ in lost))

    def riding_row(self, request_id: str, canvas: Canvas) -> Row | None:
        """Return None: nothing is committed."""
        return None

    def input_ids(self, row: Row, canvas: Canvas) -> NDArray[np.int64]:
        """Return the canvas's tokens, or those that a repeated feed saw."""
        lost = self._log.all_missing
        if row.kind is RowKind.PREFILL and lost:
            tokens: NDArray[np.int64] = lost[0][1]
            return tokens
        return canvas.token_ids[row.start : row.end]

    def note(self, row: Row) -> None:
        """Count a feed as repeated."""
        self._log.num_repeated += 1

    def note_step(self, step: Round, canvas: Canvas) -> None:
        """Keep what must be fed again to get the same keys."""
        if step.is_kept:
            self._log.note(step.feed, canvas.token_ids[step.feed.start : step.feed.end].copy())

    def note_unchanged(self, end: int) -> None:
        """Nothing is final here."""

    def reset(self, cached_len: int) -> None:
        """The slots are lost, or there have not been any yet."""
        self._log.lose()


def _row(request_id: str, kind: RowKind, start: int, end: int) -> Row:
    cost = Cost(tokens=end - start, rows=1)
    return Row(request_id=request_id, kind=kind, start=start, end=end, slot=start, cost=cost)


def _feed_row(request_id: str, feed: Feed) -> Row:
    return Row(
        request_id=request_id,
        kind=RowKind.PREFILL,
        start=feed.start,
        end=feed.end,
        slot=feed.slot,
        visible=feed.visible,
        border=feed.border,
        cost=Cost(tokens=feed.end - feed.start, rows=1),
    )
