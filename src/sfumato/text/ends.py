"""Rules that say when a text request ends and how much of its canvas is output.

`PrefixEnd` is what is served; the others are the references' and are reached in-process only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from sfumato.core.messages import FinishReason
from sfumato.text.canvas import Canvas


@dataclass(frozen=True, slots=True)
class Ending:
    """How far the output reaches now, as a canvas position, and whether the request has ended."""

    output_end: int
    reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What a step has brought.

    seen: end of what was output before. settled: end of the tokens that can no longer change. limit: end of
    what may be output. is_block_done: the open block has just been committed. written: i64 positions.
    """

    seen: int
    settled: int
    limit: int
    is_block_done: bool
    written: NDArray[np.int64]


class EndRule(Protocol):
    """Decides after each step of a request.

    edits_open: it changes the canvas within an open block.
    """

    edits_open: ClassVar[bool] = False

    def settle(self, canvas: Canvas) -> None:
        """Change the canvas after a step, before its block is looked at; most leave it as it is."""
        return

    def check(self, canvas: Canvas, after: Step) -> Ending:
        """Return the ending after a step."""
        ...


@dataclass(frozen=True, slots=True)
class PrefixEnd(EndRule):
    """Ends at the first stop token of the settled prefix, before its block is done; else at the limit."""

    stop_ids: frozenset[int]

    def check(self, canvas: Canvas, after: Step) -> Ending:
        """Look at the newly settled tokens only."""
        end = min(after.settled, after.limit)
        for position in range(after.seen, end):
            if int(canvas.token_ids[position]) in self.stop_ids:
                return Ending(position + 1, FinishReason.STOP)
        return Ending(end, FinishReason.LENGTH if end >= after.limit else None)


@dataclass(frozen=True, slots=True)
class BlockEnd(EndRule):
    """Looks for stop tokens when a block is done (SGLang, SDAR): a stop token never shortens its block."""

    stop_ids: frozenset[int]

    def check(self, canvas: Canvas, after: Step) -> Ending:
        """Output nothing until the block is done."""
        if not after.is_block_done:
            return Ending(after.seen)
        return PrefixEnd(self.stop_ids).check(canvas, after)


@dataclass(frozen=True, slots=True)
class CanvasEnd(EndRule):
    """Never ends early (official LLaDA, Fast-dLLM): the output is the whole canvas."""

    def check(self, canvas: Canvas, after: Step) -> Ending:
        """Wait for the last block."""
        return Ending(after.limit, FinishReason.LENGTH) if canvas.is_complete else Ending(after.seen)


@dataclass(frozen=True, slots=True)
class FillAfterEos(EndRule):
    """dInfer's early stop: after a step everything right of the first EOS, prompt included, becomes EOS.

    A finished block ends the request if the canvas holds an EOS. spares_first: not after the step that fills
    a block's cache.
    """

    eos_id: int
    spares_first: bool = False

    edits_open: ClassVar[bool] = True

    def settle(self, canvas: Canvas) -> None:
        """Fill everything behind the first EOS; the step is counted already."""
        if self.spares_first and canvas.step == 1:
            return
        found = np.flatnonzero(canvas.token_ids == self.eos_id)
        if found.size:
            canvas.token_ids[int(found[0]) + 1 :] = self.eos_id
            canvas.undecided[int(found[0]) + 1 :] = False

    def check(self, canvas: Canvas, after: Step) -> Ending:
        """End at the end of a block once there is an EOS."""
        if after.is_block_done and (canvas.token_ids == self.eos_id).any():
            return Ending(after.limit, FinishReason.STOP)
        return CanvasEnd().check(canvas, after)


@dataclass(frozen=True, slots=True)
class BlockFillAfterEos(EndRule):
    """dInfer's early stop of block-causal models: a finished block with an EOS makes all behind it EOS."""

    eos_id: int

    def check(self, canvas: Canvas, after: Step) -> Ending:
        """Look for an EOS in the block that was just committed."""
        if after.is_block_done and after.written.size:
            start = int(after.written[0]) // canvas.block_length * canvas.block_length
            end = start + canvas.block_length
            if (canvas.token_ids[start:end] == self.eos_id).any():
                canvas.token_ids[end:] = self.eos_id
                return Ending(after.limit, FinishReason.STOP)
        return CanvasEnd().check(canvas, after)


@dataclass(frozen=True, slots=True)
class WrittenEos(EndRule):
    """diffusers' early stop: a step that writes an EOS ends the request unless something before it is open.

    The first EOS counts, and must not stand in the prompt.
    """

    eos_id: int

    def check(self, canvas: Canvas, after: Step) -> Ending:
        """Look at what this step wrote."""
        if (canvas.token_ids[after.written] == self.eos_id).any():
            first = int((canvas.token_ids == self.eos_id).argmax())
            if first >= canvas.prompt_len and not canvas.undecided[:first].any():
                return Ending(after.limit, FinishReason.STOP)
        return CanvasEnd().check(canvas, after)


@dataclass(frozen=True, slots=True)
class PadAfterEos(EndRule):
    """transformers' end of a canvas (DiffusionGemma): behind its first EOS come pads, and nothing more."""

    eos_id: int
    pad_id: int

    def check(self, canvas: Canvas, after: Step) -> Ending:
        """Look at the canvas that was just committed."""
        if after.is_block_done and after.written.size:
            start, end = int(after.written[0]), int(after.written[-1]) + 1
            found = np.flatnonzero(canvas.token_ids[start:end] == self.eos_id)
            if found.size:
                canvas.token_ids[start + int(found[0]) + 1 : end] = self.pad_id
                return Ending(end, FinishReason.STOP)
        return CanvasEnd().check(canvas, after)
