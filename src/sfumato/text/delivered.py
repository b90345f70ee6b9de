"""What a client has of an answer whose engine is gone, on the canvas of the engine that goes on with it.

Whole blocks of it are committed. In the block behind them every position is decided again, and takes what was
delivered: pinning it would show the block's first steps more than they saw, and change what they choose. So
in equal numerics the rest of the answer is the same, and in any numerics it fits what its client has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from sfumato.core.plan import Decision
from sfumato.text.canvas import Canvas
from sfumato.text.walk import Walk


class Delivered:
    """Tokens behind a prompt that a client has already."""

    def __init__(self, token_ids: Sequence[int], prompt_len: int) -> None:
        self._tokens = np.array(token_ids, dtype=np.int64)
        self._start = prompt_len

    @property
    def end(self) -> int:
        """Return the canvas position behind them."""
        return self._start + len(self._tokens)

    def commit(self, canvas: Canvas, walk: Walk) -> None:
        """Commit the whole blocks among them, where the next one can begin from its tokens alone."""
        while walk.begins_anew and not canvas.is_complete and canvas.block_end <= self.end:
            span = canvas.undecided[canvas.block_start : canvas.block_end]
            positions = canvas.block_start + np.flatnonzero(span)
            canvas.write(positions, self._tokens[positions - self._start])
            canvas.commit_block()

    def is_open(self, canvas: Canvas) -> bool:
        """Whether one of them may still be decided."""
        return len(self._tokens) > 0 and canvas.block_start < self.end

    def hold(self, decision: Decision) -> Decision:
        """Return a decision with what was delivered in place of what it chose there."""
        first = decision.start - self._start
        start, stop = max(0, -first), min(len(decision.tokens), len(self._tokens) - first)
        if start >= stop:
            return decision
        tokens = decision.tokens.copy()
        tokens[start:stop] = self._tokens[first + start : first + stop]
        return replace(decision, tokens=tokens)
