"""The canvas of one text request: tokens, stored flags and the block that is open.

Letters: L positions of the canvas, prompt in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.core.spec import TextSpec
from sfumato.core.traits import BlockOrigin, ModelTraits
from sfumato.text.random_source import RandomSource


@dataclass(slots=True)
class Canvas:
    """token_ids i64[L], pinned bool[L] (never changes), undecided bool[L] (implies not pinned).
    given: bool[L], what the request brought (prompt and infill); guidance hides it from the other branch.

    origin: position that blocks are counted from. block_start: first position of the open block; everything
    left of it is decided. num_blocks: blocks that had an undecided position at first. step: denoise steps the
    open block has taken. masks_at_start: its undecided positions when it was opened.
    """

    token_ids: NDArray[np.int64]
    pinned: NDArray[np.bool_]
    undecided: NDArray[np.bool_]
    given: NDArray[np.bool_]
    prompt_len: int
    block_length: int
    origin: int
    random_source: RandomSource
    num_blocks: int = 0
    block_start: int = 0
    step: int = 0
    masks_at_start: int = 0
    algorithm_state: Any = None

    @property
    def length(self) -> int:
        """Return L."""
        return int(self.token_ids.shape[0])

    @property
    def block_end(self) -> int:
        """Return the end of the open block."""
        return min(self.block_start + self.block_length, self.length)

    @property
    def block_index(self) -> int:
        """Return the open block's number, counted from the origin."""
        return (self.block_start - self.origin) // self.block_length

    @property
    def is_complete(self) -> bool:
        """Whether no block is left to denoise."""
        return self.block_start >= self.length

    def open_next(self) -> None:
        """Move to the next block with an undecided position; blocks without one are known tokens."""
        open_positions = np.flatnonzero(self.undecided[self.block_start :])
        if open_positions.size == 0:
            self.block_start = self.length
            return
        first = self.block_start + int(open_positions[0])
        self.block_start = self.origin + (first - self.origin) // self.block_length * self.block_length
        self.step = 0
        self.masks_at_start = int(self.undecided[self.block_start : self.block_end].sum())
        self.algorithm_state = None

    def write(self, positions: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """Write decisions; a decision clears `undecided`, and pinned positions are never among them."""
        assert not self.pinned[positions].any()
        self.token_ids[positions] = tokens
        self.undecided[positions] = False

    def reopen(self, positions: NDArray[np.int64], mask_token_id: int) -> None:
        """Make positions undecided again; pinned ones are never among them."""
        assert not self.pinned[positions].any()
        self.token_ids[positions] = mask_token_id
        self.undecided[positions] = True

    def close(self) -> None:
        """Leave no block open, whatever may still be undecided."""
        self.block_start = self.length

    def commit_block(self) -> None:
        """Pin the open block and move on."""
        span = slice(self.block_start, self.block_end)
        self.undecided[span] = False
        self.pinned[span] = True
        self.block_start = self.block_end
        self.open_next()


def canvas_length(
    traits: ModelTraits, *, prompt_len: int, max_tokens: int, block_length: int, is_exact: bool = False
) -> int:
    """Return the canvas length in whole blocks, cut to the context.

    is_exact: end right behind max_tokens, where the model's attention allows a shorter last block.
    """
    origin = 0 if traits.block_origin is BlockOrigin.START else prompt_len
    if is_exact and not traits.has_exact_cache:
        return min(prompt_len + max_tokens, traits.context_length)
    wanted = origin + -(-(prompt_len + max_tokens - origin) // block_length) * block_length
    limit = origin + (traits.context_length - origin) // block_length * block_length
    return max(prompt_len, min(wanted, limit))


def make_canvas(
    spec: TextSpec, traits: ModelTraits, random_source: RandomSource, *, is_one_block: bool = False
) -> Canvas:
    """Lay out a validated request's canvas: the prompt pinned, the rest open but for infill pins."""
    prompt = np.asarray(spec.prompt_ids, dtype=np.int64)
    length = canvas_length(
        traits,
        prompt_len=len(prompt),
        max_tokens=spec.max_tokens,
        block_length=spec.block_length,
        is_exact=spec.infill is not None or is_one_block,
    )
    block_length = max(1, length - len(prompt)) if is_one_block else spec.block_length
    token_ids = np.full(length, traits.mask_token_id, dtype=np.int64)
    pinned = np.zeros(length, dtype=np.bool_)
    token_ids[: len(prompt)] = prompt
    pinned[: len(prompt)] = True
    for offset, token in enumerate(spec.infill or ()):
        if token is not None and len(prompt) + offset < length:
            token_ids[len(prompt) + offset] = token
            pinned[len(prompt) + offset] = True
    canvas = Canvas(
        token_ids=token_ids,
        pinned=pinned,
        undecided=~pinned,
        given=pinned.copy(),
        prompt_len=len(prompt),
        block_length=block_length,
        origin=0 if traits.block_origin is BlockOrigin.START else len(prompt),
        random_source=random_source,
    )
    canvas.num_blocks = np.unique((np.flatnonzero(canvas.undecided) - canvas.origin) // block_length).size
    canvas.block_start = canvas.origin
    canvas.open_next()
    return canvas
