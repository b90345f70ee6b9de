"""How keys and values of a request's tokens come to its pages, and what must be fed before it can denoise.

Letters: L canvas positions, B block length.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sfumato.cache.approximate import FeedLog
from sfumato.core.plan import Cost, Row, RowKind
from sfumato.text.canvas import Canvas
from sfumato.text.walk import Round


class Context(Protocol):
    """One request's cached context."""

    def is_missing(self, canvas: Canvas, step: Round | None) -> bool:
        """Whether something must be fed before the step."""
        ...

    def prefill_row(self, request_id: str, canvas: Canvas, max_tokens: int) -> Row:
        """Return a row that feeds what is missing, about max_tokens of it."""
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

    def is_missing(self, canvas: Canvas, step: Round | None) -> bool:
        """Whether known tokens lack keys, but for one block that just came out of denoising."""
        missing = canvas.block_start - self.cached_len
        if not missing or canvas.is_complete:
            return False
        return not (missing == canvas.block_length and self.cached_len >= self._first_open)

    def prefill_row(self, request_id: str, canvas: Canvas, max_tokens: int) -> Row:
        """Return the next known tokens, in whole blocks where the context is cached so."""
        size = self._granularity
        end = min(canvas.block_start, self.cached_len + max(size, max_tokens // size * size))
        return _row(request_id, RowKind.PREFILL, self.cached_len, end)

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

    def is_missing(self, canvas: Canvas, step: Round | None) -> bool:
        """Whether the step sees keys that a retraction took away."""
        return step is not None and not step.feed.is_fresh and self._log.missing is not None

    def prefill_row(self, request_id: str, canvas: Canvas, max_tokens: int) -> Row:
        """Return the next feed to repeat; queries see the whole canvas, so it cannot be cut."""
        missing = self._log.missing
        assert missing is not None
        feed = missing[0]
        return _row(
            request_id,
            RowKind.PREFILL,
            feed.start,
            feed.end,
            slot=feed.slot,
            visible=feed.visible,
            border=feed.border,
        )

    def riding_row(self, request_id: str, canvas: Canvas) -> Row | None:
        """Return None: nothing is committed."""
        return None

    def input_ids(self, row: Row, canvas: Canvas) -> NDArray[np.int64]:
        """Return the canvas's tokens, or those that a repeated feed saw."""
        missing = self._log.missing
        if row.kind is RowKind.PREFILL and missing is not None:
            tokens: NDArray[np.int64] = missing[1]
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


def _row(
    request_id: str,
    kind: RowKind,
    start: int,
    end: int,
    *,
    slot: int | None = None,
    visible: int | None = None,
    border: int = 0,
) -> Row:
    cost = Cost(tokens=end - start, rows=1)
    slot = start if slot is None else slot
    return Row(
        request_id=request_id,
        kind=kind,
        start=start,
        end=end,
        slot=slot,
        visible=visible,
        border=border,
        cost=cost,
    )
