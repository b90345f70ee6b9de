"""Each row of logits read once: best and drawn token, log-sum-exp, runner-up, entropy.

A first kernel reads parts of rows, so that few rows keep a whole GPU busy, a second one joins them. Letters:
M rows, V vocabulary, P parts of a row. Processed logits: divided by the temperature, without what filters
drop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.text.kernels.gumbel import gumbel

# Bits of a row's mode.
IS_PROCESSED = 1
IS_DRAWN = 2
IS_MEASURED_APART = 4

# Logits of one part that a program holds at a time, and programs that keep a GPU of about 130 cores busy.
_WIDTH = 1024
_NUM_PROGRAMS = 512
# Columns of a part: what `_read_part` stores.
_FLOATS = tl.constexpr(8)
_INDICES = tl.constexpr(2)
_LAST = tl.constexpr(2**31 - 1)


@dataclass(frozen=True, slots=True)
class RowModes:
    """How each row is read.

    mode: i32[M], bits of the above. temperature: f32[M]. key: i64[M], of the noise. cut: f32[M] and last:
    i32[M], what filters keep of processed logits: those above the cut, and those that equal it up to the
    index `last`; None: everything. has_processed, has_noise: whether any row has that bit.
    """

    mode: Tensor
    temperature: Tensor
    key: Tensor
    cut: Tensor | None
    last: Tensor | None
    has_processed: bool
    has_noise: bool


@dataclass(frozen=True, slots=True)
class RowsRead:
    """token, best: i64[M]; the others f32[M], as `text/statistics.py` defines them."""

    token: Tensor
    best: Tensor
    confidence: Tensor
    logprob: Tensor
    entropy: Tensor
    margin: Tensor


@triton.jit
def _grow(top, mass, weighted, x):
    """Take x into a running maximum, its sum of exponentials, and their sum weighted with the distance."""
    high = tl.maximum(top, x)
    base = tl.where(high == float("-inf"), 0.0, high)
    # Before the first number there is nothing to move: minus infinity times zero is no number.
    moved = tl.where(top == float("-inf"), 0.0, top - base)
    shrink, gap = tl.exp(top - base), x - base
    term = tl.exp(gap)
    weighted = shrink * (weighted + moved * mass) + tl.where(gap == float("-inf"), 0.0, term * gap)
    return high, shrink * mass + term, weighted


@triton.jit
def _joined(top, mass, weighted):
    """Join running sums of all lanes."""
    high = tl.max(top, 0)
    base = tl.where(high == float("-inf"), 0.0, high)
    gap = tl.where(top == float("-inf"), 0.0, top - base)
    shrink = tl.exp(top - base)
    return high, tl.sum(shrink * mass, 0), tl.sum(shrink * (weighted + gap * mass), 0)


@triton.jit
def _first_of_best(values, indices):
    """Return the largest value, and the lowest index that has it."""
    high = tl.max(values, 0)
    return high, tl.min(tl.where(values == high, indices, _LAST), 0)


@triton.jit
def _runner_up(best, second, indices, winner):
    """Return the largest value beside the winner's: lanes hold their best, its index, and their second."""
    return tl.max(tl.where(indices == winner, second, best), 0)


# Arrays of a number per row begin anywhere: no variant for each place.
@triton.jit(do_not_specialize_on_alignment=["temperatures", "keys", "cuts", "lasts"])
def _read_part(
    logits,
    row_stride,
    size,
    temperatures,
    keys,
    cuts,
    lasts,
    floats,
    indices,
    part_size,
    WIDTH: tl.constexpr,
    HAS_PROCESSED: tl.constexpr,
    HAS_CUTS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, WIDTH)
    start = part * part_size
    stop = tl.minimum(start + part_size, size)
    logits += row.to(tl.int64) * row_stride
    temperature, key = tl.load(temperatures + row), tl.load(keys + row)
    if HAS_CUTS:
        cut, last = tl.load(cuts + row), tl.load(lasts + row)
    least = tl.full([WIDTH], float("-inf"), tl.float32)
    zeros = tl.zeros([WIDTH], tl.float32)
    top, mass, weighted = least, zeros, zeros
    best, second, best_at = least, least, start + lanes
    own_top, own_mass, own_weighted = least, zeros, zeros
    drawn, drawn_at = least, start + lanes
    for first in range(start, stop, WIDTH):
        at = first + lanes
        x = tl.load(logits + at, mask=at < stop, other=float("-inf")).to(tl.float32)
        top, mass, weighted = _grow(top, mass, weighted, x)
        own = x
        if HAS_PROCESSED:
            own = tl.div_rn(x, tl.broadcast_to(temperature, [WIDTH]))
            if HAS_CUTS:
                is_kept = (own > cut) | ((own == cut) & (at <= last))
                own = tl.where(is_kept | (x != x), own, float("-inf"))
            own_top, own_mass, own_weighted = _grow(own_top, own_mass, own_weighted, own)
        second = tl.maximum(second, tl.minimum(best, own))
        best_at = tl.where(own > best, at, best_at)
        best = tl.maximum(best, own)
        if HAS_NOISE:
            noisy = tl.where(at < stop, own + gumbel(key, at), float("-inf"))
            drawn_at = tl.where(noisy > drawn, at, drawn_at)
            drawn = tl.maximum(drawn, noisy)
    floats += (row * tl.num_programs(1) + part).to(tl.int64) * _FLOATS
    indices += (row * tl.num_programs(1) + part).to(tl.int64) * _INDICES
    high, total, spread = _joined(top, mass, weighted)
    tl.store(floats + 0, high)
    tl.store(floats + 1, total)
    if HAS_PROCESSED:
        high, total, spread = _joined(own_top, own_mass, own_weighted)
    tl.store(floats + 2, high)
    tl.store(floats + 3, total)
    tl.store(floats + 4, spread)
    high, winner = _first_of_best(best, best_at)
    tl.store(floats + 5, high)
    tl.store(floats + 6, _runner_up(best, second, best_at, winner))
    tl.store(indices + 0, winner)
    if HAS_NOISE:
        high, winner = _first_of_best(drawn, drawn_at)
        tl.store(floats + 7, high)
        tl.store(indices + 1, winner)


@triton.jit(
    do_not_specialize=["num_parts", "num_rows"],
    do_not_specialize_on_alignment=["modes", "temperatures"],
)
def _join_parts(
    logits,
    row_stride,
    size,
    modes,
    temperatures,
    floats,
    indices,
    num_parts,
    tokens,
    results,
    num_rows,
    PARTS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    is_there = part < num_parts
    floats += (row * num_parts + part).to(tl.int64) * _FLOATS
    indices += (row * num_parts + part).to(tl.int64) * _INDICES
    mode, temperature = tl.load(modes + row), tl.load(temperatures + row)
    least = float("-inf")
    top = tl.load(floats + 0, mask=is_there, other=least)
    mass = tl.load(floats + 1, mask=is_there, other=0.0)
    high, total, _ = _joined(top, mass, tl.zeros([PARTS], tl.float32))
    own_top = tl.load(floats + 2, mask=is_there, other=least)
    own_mass = tl.load(floats + 3, mask=is_there, other=0.0)
    own_spread = tl.load(floats + 4, mask=is_there, other=0.0)
    own_high, own_total, own_spread = _joined(own_top, own_mass, own_spread)
    best = tl.load(floats + 5, mask=is_there, other=least)
    second = tl.load(floats + 6, mask=is_there, other=least)
    best_at = tl.load(indices + 0, mask=is_there, other=_LAST)
    most, winner = _first_of_best(best, best_at)
    runner_up = _runner_up(best, second, best_at, winner)
    token = winner
    if HAS_NOISE:
        drawn = tl.load(floats + 7, mask=is_there, other=least)
        drawn_at = tl.load(indices + 1, mask=is_there, other=_LAST)
        _, at = _first_of_best(drawn, drawn_at)
        token = tl.where((mode & 2) != 0, at, winner)
    # Where nothing is a number there is no best token; one that exists stands for it.
    token = tl.minimum(token, size - 1)
    x = tl.load(logits + row.to(tl.int64) * row_stride + token).to(tl.float32)
    logprob = x - (high + tl.log(total))
    own_logprob = tl.div_rn(x, temperature) - (own_high + tl.log(own_total))
    confidence = tl.exp(tl.where((mode & 4) != 0, own_logprob, logprob))
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(tokens + num_rows + row, tl.minimum(winner, size - 1).to(tl.int64))
    tl.store(results + row, confidence)
    tl.store(results + num_rows + row, logprob)
    tl.store(results + 2 * num_rows + row, tl.log(own_total) - own_spread / own_total)
    tl.store(results + 3 * num_rows + row, (1.0 - tl.exp(runner_up - most)) / own_total)


def read_rows(logits: Tensor, modes: RowModes) -> RowsRead:
    """Read logits [M, V] of any float dtype, with a stride between rows."""
    num_rows, size = logits.shape
    device = logits.device
    tokens = torch.empty((2, num_rows), dtype=torch.int64, device=device)
    results = torch.empty((4, num_rows), dtype=torch.float32, device=device)
    if not num_rows:
        return RowsRead(*tokens, *results)
    assert logits.stride(1) == 1
    num_blocks = triton.cdiv(size, _WIDTH)
    num_parts = max(1, min(num_blocks, _NUM_PROGRAMS // num_rows))
    part_size = triton.cdiv(num_blocks, num_parts) * _WIDTH
    num_parts = triton.cdiv(size, part_size)
    floats = torch.empty((num_rows, num_parts, 8), dtype=torch.float32, device=device)
    indices = torch.empty((num_rows, num_parts, 2), dtype=torch.int32, device=device)
    has_cuts = modes.cut is not None
    _read_part[(num_rows, num_parts)](
        logits,
        logits.stride(0),
        size,
        modes.temperature,
        modes.key,
        modes.cut if has_cuts else modes.temperature,
        modes.last if has_cuts else modes.mode,
        floats,
        indices,
        part_size,
        WIDTH=_WIDTH,
        HAS_PROCESSED=modes.has_processed,
        HAS_CUTS=has_cuts,
        HAS_NOISE=modes.has_noise,
        num_warps=4,
    )
    _join_parts[(num_rows,)](
        logits,
        logits.stride(0),
        size,
        modes.mode,
        modes.temperature,
        floats,
        indices,
        num_parts,
        tokens,
        results,
        num_rows,
        PARTS=triton.next_power_of_2(num_parts),
        HAS_NOISE=modes.has_noise,
        num_warps=1,
    )
    return RowsRead(*tokens, *results)
