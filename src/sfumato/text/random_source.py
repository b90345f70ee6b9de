"""Where a request's random numbers come from: counter-based in service, recorded draws in replays.

Letters: M positions, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# What a number is drawn for; part of the key, so that two uses never share a number.
PURPOSE_TOKEN = 1
PURPOSE_ORDER = 2
PURPOSE_VOCABULARY = 3

# The largest float32 below 1.
LARGEST_UNIFORM = 1.0 - 2.0**-24

GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


class RandomSource(Protocol):
    """Draws for one request; equal arguments give equal numbers, in whatever order they are asked for."""

    def gumbel(self, block: int, step: int, positions: NDArray[np.int64], vocab_size: int) -> Tensor:
        """Return Gumbel noise [M, V] for the choice of tokens."""
        ...

    def uniform(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return numbers f32[M] in [0, 1) for a random order of positions."""
        ...

    def vocabulary(
        self, block: int, step: int, positions: NDArray[np.int64], vocab_size: int
    ) -> NDArray[np.int64]:
        """Return tokens i64[M], each as likely as any other; step -1 is a block's first canvas."""
        ...

    def routes(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return recorded choices i64[M] among an algorithm's ways to go on, or None."""
        ...

    def tokens(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return recorded tokens i64[M] to take instead of drawing, or None."""
        ...

    def token_keys(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return keys i64[M] from which a kernel computes `gumbel` itself; None: numbers are not counted."""
        ...


class CounterSource:
    """Numbers keyed by (seed, choice, purpose, block, step, position, vocabulary index).

    The key goes through SplitMix64's finaliser (Steele, Lea, Flood 2014) once per coordinate, so that no
    state exists that an order of execution, a neighbour or a preemption could change.
    """

    def __init__(self, seed: int, choice: int = 0) -> None:
        self._root = _mix(_mix(seed & _MASK) ^ (choice + 1))

    def _keys(self, purpose: int, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
        prefix = _mix(_mix(_mix(self._root ^ purpose) ^ (block + 1)) ^ (step + 1))
        return _mix_array(positions.astype(np.uint64) ^ np.uint64(prefix))

    def gumbel(self, block: int, step: int, positions: NDArray[np.int64], vocab_size: int) -> Tensor:
        """Return Gumbel noise f32[M, V]; one hash per number, a position at a time: it stays in the cache."""
        keys = torch.from_numpy(self.token_keys(block, step, positions))
        index = torch.arange(1, vocab_size + 1, dtype=torch.int64) * _signed(GAMMA)
        bits, scratch = torch.empty_like(index), torch.empty_like(index)
        noise = torch.empty(len(keys), vocab_size)
        for key, row in zip(keys, noise, strict=True):
            torch.bitwise_xor(index, key, out=bits)
            _mix_in_place(bits, scratch)
            # 24 bits fill a float32 mantissa; half a unit keeps the inner logarithm finite. The largest
            # number and its half round to 1, whose noise would be infinite.
            row.copy_(bits.bitwise_right_shift_(40).bitwise_and_(0xFFFFFF)).add_(0.5).mul_(2.0**-24)
            row.clamp_(max=LARGEST_UNIFORM)
            row.log_().neg_().log_().neg_()
        return noise

    def token_keys(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return keys i64[M]; number v of a position is the mixed key ^ (v + 1) * gamma."""
        return self._keys(PURPOSE_TOKEN, block, step, positions).view(np.int64)

    def uniform(self, block: int, step: int, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return uniform numbers f32[M]."""
        keys = self._keys(PURPOSE_ORDER, block, step, positions)
        return ((keys >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)

    def vocabulary(
        self, block: int, step: int, positions: NDArray[np.int64], vocab_size: int
    ) -> NDArray[np.int64]:
        """Return random tokens i64[M]; the bias of the remainder is below 2^-40."""
        keys = self._keys(PURPOSE_VOCABULARY, block, step, positions)
        return (keys % np.uint64(vocab_size)).astype(np.int64)

    def routes(self, block: int, step: int, positions: NDArray[np.int64]) -> None:
        """Return None: routes are drawn, not recorded."""
        return

    def tokens(self, block: int, step: int, positions: NDArray[np.int64]) -> None:
        """Return None: tokens are drawn, not recorded."""
        return


def _mix(value: int) -> int:
    value = (value + GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * MIX_2) & _MASK
    return value ^ (value >> 31)


def _mix_array(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        value = value + np.uint64(GAMMA)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(MIX_1)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(MIX_2)
        return value ^ (value >> np.uint64(31))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix_in_place(value: Tensor, scratch: Tensor) -> None:
    """Mix i64[V]; scratch: i64[V]."""
    for bits, factor in ((30, MIX_1), (27, MIX_2), (31, 1)):
        # Torch's shift of int64 keeps the sign; this one is logical.
        torch.bitwise_right_shift(value, bits, out=scratch)
        value.bitwise_xor_(scratch.bitwise_and_((1 << (64 - bits)) - 1)).mul_(_signed(factor))
