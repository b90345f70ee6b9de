"""Rules that say when a text request ends and how much of its canvas is output.

`PrefixEnd` is what is served; the others are the references' and are reached in-process only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sfumato.core.messages import FinishReason
from sfumato.text.canvas import Canvas


@dataclass(frozen=True, slots=True)
class Ending:
    """How far the output reaches now, as a canvas position, and whether the request has ended."""

    output_end: int
    reason: FinishReason | None = None


class EndRule(Protocol):
    """Decides after each step of a request."""

    def settle(self, canvas: Canvas) -> None:
        """Change the canvas after a step, before its block is looked at."""
        ...

    def check(self, canvas: Canvas, *, seen: int, settled: int, limit: int, is_block_done: bool) -> Ending:
        """Return the ending.

        seen: end of what was output before. settled: end of the tokens that can no longer change. limit: end
        of what may be output. is_block_done: the open block has just been committed.
        """
        ...


@dataclass(frozen=True, slots=True)
class PrefixEnd:
    """Ends at the first stop token of the settled prefix, before its block is done; else at the limit."""

    stop_ids: frozenset[int]

    def settle(self, canvas: Canvas) -> None:
        """Leave the canvas as it is."""

    def check(self, canvas: Canvas, *, seen: int, settled: int, limit: int, is_block_done: bool) -> Ending:
        """Look at the newly settled tokens only."""
        end = min(settled, limit)
        for position in range(seen, end):
            if int(canvas.token_ids[position]) in self.stop_ids:
                return Ending(position + 1, FinishReason.STOP)
        return Ending(end, FinishReason.LENGTH if end >= limit else None)


@dataclass(frozen=True, slots=True)
class BlockEnd:
    """Looks for stop tokens when a block is done (SGLang, SDAR): a stop token never shortens its block."""

    stop_ids: frozenset[int]

    def settle(self, canvas: Canvas) -> None:
        """Leave the canvas as it is."""

    def check(self, canvas: Canvas, *, seen: int, settled: int, limit: int, is_block_done: bool) -> Ending:
        """Output nothing until the block is done."""
        if not is_block_done:
            return Ending(seen)
        rule = PrefixEnd(self.stop_ids)
        return rule.check(canvas, seen=seen, settled=settled, limit=limit, is_block_done=True)


@dataclass(frozen=True, slots=True)
class CanvasEnd:
    """Never ends early (official LLaDA, Fast-dLLM): the output is the whole canvas."""

    def settle(self, canvas: Canvas) -> None:
        """Leave the canvas as it is."""

    def check(self, canvas: Canvas, *, seen: int, settled: int, limit: int, is_block_done: bool) -> Ending:
        """Wait for the last block."""
        return Ending(limit, FinishReason.LENGTH) if canvas.is_complete else Ending(seen)


@dataclass(frozen=True, slots=True)
class FillAfterEos:
    """dInfer's early stop: after a step everything right of the first EOS, prompt included, becomes EOS.

    A finished block ends the request if the canvas holds an EOS.
    """

    eos_id: int

    def settle(self, canvas: Canvas) -> None:
        """Fill everything behind the first EOS."""
        found = np.flatnonzero(canvas.token_ids == self.eos_id)
        if found.size:
            canvas.token_ids[int(found[0]) + 1 :] = self.eos_id
            canvas.undecided[int(found[0]) + 1 :] = False

    def check(self, canvas: Canvas, *, seen: int, settled: int, limit: int, is_block_done: bool) -> Ending:
        """End at the end of a block once there is an EOS."""
        if is_block_done and (canvas.token_ids == self.eos_id).any():
            return Ending(limit, FinishReason.STOP)
        return CanvasEnd().check(canvas, seen=seen, settled=settled, limit=limit, is_block_done=is_block_done)
