"""Keys of a tile divided among programs, and their sums joined: how a GPU is filled by few queries.

Parts are joined as running softmaxes are (arXiv:1805.02867, section 3.1). How many there are is known on the
host; how many keys each has follows from lengths that lie on the device. Letters: N packed tokens, H query
heads, D head width, T tiles, G groups of heads that a program computes, S parts, R rows of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that a core is given: while one waits for keys another multiplies.
_PROGRAMS_PER_CORE = 2
# Beyond these, joining the parts is a part of the work.
_MOST_SPLITS = 32
# Fewer keys are walked over faster than their sums are written and read again.
LEAST_KEYS = tl.constexpr(128)


def num_splits_of(num_programs: int, num_cores: int) -> int:
    """Return among how many programs the keys of each are divided: a power of two, 1 where there are enough.

    Programs are counted as a batch's shape has them, filled-up tiles too: what is recorded may not depend on
    more.
    """
    splits = 1
    while splits < _MOST_SPLITS and 2 * splits * num_programs <= _PROGRAMS_PER_CORE * num_cores:
        splits *= 2
    return splits


def num_cores_of(tensor: Tensor) -> int:
    """Return how many multiprocessors the tensor's GPU has; 0 for the interpreter, which has none to fill."""
    if not tensor.is_cuda:
        return 0
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


@triton.jit(do_not_specialize_on_alignment=["tiles"])
def _join_parts(
    totals,
    tops,
    masses,
    output,
    output_stride,
    tiles,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    tile, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    chunks: tl.constexpr = (SHARED + HEADS - 1) // HEADS
    token, head = row // HEADS, (group % chunks) * HEADS + row % HEADS
    if (token < tl.load(tiles + tile * 3 + 1)) & (token < TILE) & (head < SHARED):
        split = tl.arange(0, SPLITS)
        place = ((tile * tl.num_programs(1) + group) * SPLITS + split) * ROWS + row
        top, mass = tl.load(tops + place), tl.load(masses + place)
        high = tl.max(top, 0)
        factor = tl.exp2(top - tl.where(high == float("-inf"), 0.0, high))
        width = tl.arange(0, PADDED_WIDTH)
        is_width = width < WIDTH
        # Nobody wrote the sums of a part without keys; what is no number is no zero, and shows.
        total = tl.load(
            totals + place[:, None] * PADDED_WIDTH + width[None, :],
            mask=(mass != 0.0)[:, None] & is_width[None, :],
            other=0.0,
        )
        joined = tl.sum(mass * factor, 0)
        result = tl.sum(total * factor[:, None], 0) / tl.where(joined > 0.0, joined, 1.0)
        at = tl.load(tiles + tile * 3) + token
        place = at * output_stride + ((group // chunks) * SHARED + head) * WIDTH + width
        tl.store(output + place, result.to(output.dtype.element_ty), mask=is_width)


def join_parts(
    totals: Tensor,
    tops: Tensor,
    masses: Tensor,
    output: Tensor,
    tiles: Tensor,
    *,
    shared: int,
    tile: int,
    heads: int,
) -> None:
    """Write the sums of all parts, over their masses, to the tiles' tokens in output, [N, H, D].

    totals: f32[T, G, S, R, padded width], tops and masses: f32[T, G, S, R], each in base 2 over its own top.
    shared: heads with one key head, of which a program has `heads`.
    """
    num_tiles, groups, splits, rows, padded = totals.shape
    _join_parts[(num_tiles, groups, rows)](
        totals,
        tops,
        masses,
        output,
        output.stride(0),
        tiles,
        SHARED=shared,
        WIDTH=output.shape[2],
        PADDED_WIDTH=padded,
        TILE=tile,
        HEADS=heads,
        ROWS=rows,
        SPLITS=splits,
        num_warps=4,
    )
