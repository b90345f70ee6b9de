"""What top-k and top-p keep of a row of logits, without sorting it: the value from which tokens stay.

Values are searched by the bits of their float, which are ordered like the numbers, four at a time. Letters: M
rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDTH = 1024
_LAST = tl.constexpr(2**31 - 1)
_LEAST = tl.constexpr(-(2**31))
# Values tried at a time: four bits of 32.
_TRIED = tl.constexpr(16)


@triton.jit
def _ordered(values):
    """Return i32 that are ordered like floats; minus zero is zero."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float_of(order):
    """Return the float of an i32 that `_ordered` gave."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _row(logits, first, size, temperature, WIDTH: tl.constexpr):
    """Return indices, the logits over the temperature, and their order."""
    at = first + tl.arange(0, WIDTH)
    x = tl.load(logits + at, mask=at < size, other=float("-inf")).to(tl.float32)
    x = tl.div_rn(x, tl.broadcast_to(temperature, [WIDTH]))
    return at, x, _ordered(x)


@triton.jit
def _weight(at, x, order, size, low, low_last, high, BY_MASS: tl.constexpr):
    """Return what a token counts: one or its exponential; nothing where it is left out already."""
    is_there = (at < size) & ((order > low) | ((order == low) & (at <= low_last)))
    if BY_MASS:
        return tl.where(is_there, tl.exp(x - high), 0.0)
    return tl.where(is_there, 1.0, 0.0)


@triton.jit
def _highest(logits, size, temperature, WIDTH: tl.constexpr):
    best = tl.full([WIDTH], float("-inf"), tl.float32)
    for first in range(0, size, WIDTH):
        _, x, _ = _row(logits, first, size, temperature, WIDTH)
        best = tl.maximum(best, x)
    return tl.max(best, 0)


@triton.jit
def _search(
    logits, size, temperature, low, low_last, high, limit, WIDTH: tl.constexpr, BY_MASS: tl.constexpr
):
    """Return the largest order from which on all tokens together weigh more than the limit."""
    found = tl.full([], _LEAST, tl.int32)
    tried = tl.arange(0, _TRIED)
    for step in range(8):
        shift = 28 - 4 * step
        # Wraps around as it must: the orders begin with the least number.
        candidates = found + (tried << shift)
        weights = tl.zeros([_TRIED], tl.float32)
        for first in range(0, size, WIDTH):
            at, x, order = _row(logits, first, size, temperature, WIDTH)
            weight = _weight(at, x, order, size, low, low_last, high, BY_MASS)
            weights += tl.sum(tl.where(order[:, None] >= candidates[None, :], weight[:, None], 0.0), 0)
        digit = tl.sum(((weights > limit) & (tried > 0)).to(tl.int32), 0)
        found += digit << shift
    return found


@triton.jit
def _mass(logits, size, temperature, low, low_last, high, above, WIDTH: tl.constexpr):
    """Return the summed exponentials of what is left and lies above an order."""
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(0, size, WIDTH):
        at, x, order = _row(logits, first, size, temperature, WIDTH)
        total += tl.where(order > above, _weight(at, x, order, size, low, low_last, high, True), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _place_of(logits, size, temperature, value, count, WIDTH: tl.constexpr):
    """Return the index of the count-th token with an order, from 1 on; of the last where there are fewer."""
    seen, last = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for first in range(0, size, WIDTH):
        at, _, order = _row(logits, first, size, temperature, WIDTH)
        is_equal = ((order == value) & (at < size)).to(tl.int32)
        place = seen + tl.cumsum(is_equal, 0)
        last = tl.maximum(last, tl.max(tl.where((is_equal > 0) & (place <= count), at, 0), 0))
        seen += tl.sum(is_equal, 0)
    return last


@triton.jit
def _keep_best(logits, size, temperature, low, low_last, high, top_k, WIDTH: tl.constexpr):
    """Narrow what is left to the k best; equal logits at the k-th place all stay."""
    if (top_k > 0) & (top_k < size):
        kth = _search(logits, size, temperature, low, low_last, high, top_k - 0.5, WIDTH, False)
        # Fewer than k are left: all of them stay.
        if kth > low:
            low, low_last = kth, tl.full([], _LAST, tl.int32)
    return low, low_last


@triton.jit
def _keep_mass(logits, size, temperature, low, low_last, high, top_p, WIDTH: tl.constexpr):
    """Narrow what is left to the smallest set with this probability; of equal logits the first stay."""
    if top_p < 1.0:
        total = _mass(logits, size, temperature, low, low_last, high, _LEAST, WIDTH)
        limit = top_p * total
        value = _search(logits, size, temperature, low, low_last, high, limit, WIDTH, True)
        if value > low:
            above = _mass(logits, size, temperature, low, low_last, high, value, WIDTH)
            own = tl.exp(_float_of(value) - high)
            count = tl.floor((limit - above) / own).to(tl.int32) + 1
            low_last = _place_of(logits, size, temperature, value, count, WIDTH)
            low = value
        elif value == low:
            above = _mass(logits, size, temperature, low, low_last, high, value, WIDTH)
            own = tl.exp(_float_of(value) - high)
            count = tl.floor((limit - above) / own).to(tl.int32) + 1
            low_last = tl.minimum(low_last, _place_of(logits, size, temperature, value, count, WIDTH))
    return low, low_last


@triton.jit(do_not_specialize_on_alignment=["temperatures", "top_ks", "top_ps", "firsts"])
def _cut_rows(
    logits, row_stride, size, temperatures, top_ks, top_ps, firsts, cuts, lasts, WIDTH: tl.constexpr
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    temperature = tl.load(temperatures + row)
    top_k, top_p, mass_first = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(firsts + row)
    low, low_last = tl.full([], _LEAST, tl.int32), tl.full([], _LAST, tl.int32)
    if ((top_k > 0) & (top_k < size)) | (top_p < 1.0):
        high = _highest(logits, size, temperature, WIDTH)
        if mass_first != 0:
            low, low_last = _keep_mass(logits, size, temperature, low, low_last, high, top_p, WIDTH)
            low, low_last = _keep_best(logits, size, temperature, low, low_last, high, top_k, WIDTH)
        else:
            low, low_last = _keep_best(logits, size, temperature, low, low_last, high, top_k, WIDTH)
            low, low_last = _keep_mass(logits, size, temperature, low, low_last, high, top_p, WIDTH)
    # Nothing is left out below the least order, whose bits are no number.
    cut = tl.where(low == _LEAST, float("-inf"), _float_of(low))
    tl.store(cuts + row, cut)
    tl.store(lasts + row, low_last)


def cut_rows(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, top_p_first: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `text/sampling.py` keeps of logits [M, V] over the temperature: cut f32[M], last i32[M].

    Tokens above the cut stay, and those that equal it up to the index `last`. temperature, top_p: f32[M];
    top_k, top_p_first: i32[M], 0 for none; rows that ask for no filter cost no pass.
    """
    num_rows, size = logits.shape
    cut = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    last = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows:
        assert logits.stride(1) == 1
        _cut_rows[(num_rows,)](
            logits,
            logits.stride(0),
            size,
            temperature,
            top_k,
            top_p,
            top_p_first,
            cut,
            last,
            WIDTH=_WIDTH,
            num_warps=8,
        )
    return cut, last
