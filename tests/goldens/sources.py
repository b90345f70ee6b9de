"""Random sources of replays: recorded draws, or torch's generator in a reference's order and shape."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class ArgmaxSource:
    """No noise: the best token of the filtered distribution is taken."""

    def gumbel(self, block: int, step: int, positions: NDArray[np.int64], vocab_size: int) -> Tensor:
        """Return zeros [M, V]."""
        return torch.zeros(len(positions), vocab_size)

    def uniform(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return zeros f32[M]; nothing that is replayed with this source asks for them."""
        return np.zeros(len(positions), dtype=np.float32)

    def vocabulary(
        self, block: int, step: int, positions: NDArray[np.int64], vocab_size: int
    ) -> NDArray[np.int64]:
        """Return zeros i64[M]; nothing that is replayed with this source asks for them."""
        return np.zeros(len(positions), dtype=np.int64)

    def routes(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return None."""
        return None

    def tokens(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return None."""
        return None

    def token_keys(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return None: no number is counted."""
        return None


class RecordedTokens(ArgmaxSource):
    """Tokens that a reference drew: block and step -> i64[B] for all positions of the block."""

    def __init__(self, drawn: dict[tuple[int, int], NDArray[np.int64]], block_length: int) -> None:
        self._drawn = drawn
        self._block_length = block_length

    def tokens(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the recorded tokens of these positions."""
        return self._drawn[block, step][positions - block * self._block_length]


class RecordedOrder(ArgmaxSource):
    """Uniform numbers that a reference drew: f32[steps, L] of one row, padding removed."""

    def __init__(self, drawn: Tensor, steps_per_block: int) -> None:
        self._drawn = drawn.numpy()
        self._steps_per_block = steps_per_block

    def uniform(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the recorded numbers of these positions."""
        drawn: NDArray[np.float32] = self._drawn[block * self._steps_per_block + step][positions]
        return drawn


class TorchSource(ArgmaxSource):
    """torch.rand in the order of ML-GSAI/LLaDA: per step float64 [B, L, V], then float32 [B, L] if asked for.

    row: of the batch. padding: positions of the row in front of its prompt.
    """

    def __init__(
        self,
        *,
        seed: int,
        shape: tuple[int, int, int],
        row: int,
        padding: int,
        steps_per_block: int,
        has_tokens: bool,
        has_order: bool,
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._shape = shape
        self._row = row
        self._padding = padding
        self._steps_per_block = steps_per_block
        self._has_tokens = has_tokens
        self._has_order = has_order
        self._num_drawn = 0
        self._tokens = torch.empty(0)
        self._order = torch.empty(0)

    def _draw_to(self, block: int, step: int) -> None:
        wanted = block * self._steps_per_block + step
        batch, length, _ = self._shape
        while self._num_drawn <= wanted:
            if self._has_tokens:
                self._tokens = torch.rand(self._shape, generator=self._generator, dtype=torch.float64)
            if self._has_order:
                self._order = torch.rand((batch, length), generator=self._generator)
            self._num_drawn += 1

    def gumbel(self, block: int, step: int, positions: NDArray[np.int64], vocab_size: int) -> Tensor:
        """Return -log(-log u) f64[M, V]."""
        self._draw_to(block, step)
        uniform = self._tokens[self._row, torch.from_numpy(positions + self._padding)]
        return -(-uniform.log()).log()

    def uniform(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return f32[M]."""
        self._draw_to(block, step)
        drawn: NDArray[np.float32] = self._order[self._row].numpy()[positions + self._padding]
        return drawn

    def tokens(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return None."""
        return None
