"""Attention over pages: each query sees keys [first, end) of its row, whatever its neighbours see.

A program computes the queries of one tile for some heads that share a key head, and walks over the keys that
any of them sees with a running softmax (arXiv:2205.14135, algorithm 1, without the backward pass). Where
programs are few, several walk over a part of the keys each. Letters: N packed tokens, H query heads, K
key-value heads, D head width, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.models.kernels.splitting import LEAST_KEYS, join_parts, num_cores_of, num_splits_of
from sfumato.models.paged import Paged

# The smallest side of a matrix product in a kernel.
_SMALLEST = 16
# Bytes of keys that a program holds at a time, and the most keys.
_KEY_BYTES = 16384
_MOST_KEYS = 64
# The widest heads whose float32 products are single ones.
_WIDEST_SINGLE = 32
_LOG2_E = 1.4426950408889634


# Numbers that lie where the batch before them ends: no variant for each of their places.
@triton.jit(do_not_specialize_on_alignment=["tiles", "firsts", "ends", "pages"])
def _attend_tile(
    query,
    query_stride,
    keys,
    values,
    output,
    output_stride,
    totals,
    tops,
    masses,
    tiles,
    firsts,
    ends,
    pages,
    scale,
    SHARED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_WINDOWED: tl.constexpr,
    IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    chunk, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    start = tl.load(tiles + tile * 3)
    count = tl.load(tiles + tile * 3 + 1)
    pages += tl.load(tiles + tile * 3 + 2)
    # Rows of the products: heads of one query beside each other.
    row = tl.arange(0, ROWS)
    token, head = row // HEADS, chunk * HEADS + row % HEADS
    is_query = (token < count) & (token < TILE) & (head < SHARED)
    at = start + token
    end = tl.load(ends + at, mask=is_query, other=0).to(tl.int32)
    stop = tl.max(end, 0)
    begin = 0
    if IS_WINDOWED:
        first = tl.load(firsts + at, mask=is_query, other=2**31 - 1).to(tl.int32)
        begin = tl.minimum(tl.min(first, 0), stop)
    if SPLITS > 1:
        # Whole steps of the walk, so that no key is in two parts.
        part = tl.cdiv(tl.maximum(tl.cdiv(stop - begin, SPLITS), LEAST_KEYS), KEYS) * KEYS
        begin += split * part
        stop = tl.minimum(stop, begin + part)
    width = tl.arange(0, PADDED_WIDTH)
    is_width = width < WIDTH
    place = (kv_head * SHARED + head)[:, None] * WIDTH + width[None, :]
    is_kept = is_query[:, None] & is_width[None, :]
    # Where there is nothing to walk over, nothing is read or written either.
    has_keys = is_kept & (tl.broadcast_to(stop, [ROWS]) > begin)[:, None]
    q = tl.load(query + at[:, None] * query_stride + place, mask=has_keys, other=0.0)
    if IS_WIDE:
        q = q.to(tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, PADDED_WIDTH], tl.float32)
    for next_key in range(begin, stop, KEYS):
        key = next_key + tl.arange(0, KEYS)
        is_key = key < stop
        page = tl.load(pages + key // PAGE, mask=is_key, other=0)
        slot = page * PAGE + key % PAGE
        where = (slot * KV_HEADS + kv_head)[:, None] * WIDTH + width[None, :]
        is_read = is_key[:, None] & is_width[None, :]
        k = tl.load(keys + where, mask=is_read, other=0.0)
        if IS_WIDE:
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        is_seen = key[None, :] < end[:, None]
        if IS_WINDOWED:
            is_seen = is_seen & (key[None, :] >= first[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        high = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(high == float("-inf"), 0.0, high)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        v = tl.load(values + where, mask=is_read, other=0.0)
        if IS_WIDE:
            v = v.to(tl.float32)
        total = total * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        mass = mass * shrink + tl.sum(weights, 1)
        top = high
    if SPLITS > 1:
        own = ((tile * KV_HEADS + kv_head) * tl.num_programs(2) + tl.program_id(2)) * ROWS + row
        tl.store(tops + own, top)
        tl.store(masses + own, mass)
        tl.store(totals + own[:, None] * PADDED_WIDTH + width[None, :], total, mask=has_keys)
    else:
        # A query that sees nothing has zeros.
        result = total / tl.where(mass > 0.0, mass, 1.0)[:, None]
        places = output + at[:, None] * output_stride + place
        tl.store(places, result.to(output.dtype.element_ty), mask=is_kept)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a program works: rows of its products, heads among them, keys at a time; warps and stages."""

    padded_width: int
    heads: int
    rows: int
    keys: int
    precision: str
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, object]:
        """Return them as the kernel's arguments."""
        return {
            "PADDED_WIDTH": self.padded_width,
            "HEADS": self.heads,
            "ROWS": self.rows,
            "KEYS": self.keys,
            "PRECISION": self.precision,
        }

    def options(self) -> dict[str, int]:
        """Return what the compiler is told."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def plan_of(width: int, *, shared: int, tile: int, itemsize: int) -> Plan:
    """Return the plan for tiles of `tile` queries and heads of a width; `shared` of them use one key head."""
    # Many programs of few rows: with few requests a GPU has more cores than there is work.
    heads = min(triton.next_power_of_2(shared), max(1, _SMALLEST // tile))
    padded = max(_SMALLEST, triton.next_power_of_2(width))
    return Plan(
        padded_width=padded,
        heads=heads,
        rows=max(_SMALLEST, tile * heads),
        keys=max(_SMALLEST, min(_MOST_KEYS, _KEY_BYTES // (padded * itemsize))),
        # Of float32 alone: single products fill registers, three of the tensor cores' are nearly as exact.
        precision="ieee" if padded <= _WIDEST_SINGLE else "tf32x3",
        num_warps=4 if padded <= 128 else 8,
        num_stages=2 if itemsize > 2 else 3,
    )


def attend_tiles(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    paged: Paged,
    output: Tensor,
    *,
    windowed: bool,
    scale: float,
    splits: int | None = None,
) -> None:
    """Compute attention of query [N, H, D] to keys, values: [S, K, D] for the tokens of all tiles.

    Writes into output, [N, H, D]. Where the heads of a query lie together nothing is copied. splits: programs
    among which each tile's keys are divided, a power of two; None: as many as its number of tiles leaves room
    for. That number is the shape's, whatever the tiles are; a tile's parts follow from what its own queries
    see. So in one shape a request's result does not depend on its neighbours, and between shapes it is
    rounded differently, as matrix products are too.
    """
    num_heads, width = query.shape[1:]
    kv_heads = keys.shape[1]
    num_tiles = len(paged.tiles)
    if not num_tiles:
        return
    if query.stride()[1:] != (width, 1):
        query = query.contiguous()
    assert output.stride()[1:] == (width, 1)
    shared = num_heads // kv_heads
    plan = plan_of(width, shared=shared, tile=paged.tile, itemsize=keys.element_size())
    chunks = triton.cdiv(shared, plan.heads)
    if splits is None:
        splits = num_splits_of(num_tiles * kv_heads * chunks, num_cores_of(keys))
    totals = tops = masses = output
    if splits > 1:
        size = (num_tiles, kv_heads * chunks, splits, plan.rows)
        totals = torch.empty((*size, plan.padded_width), dtype=torch.float32, device=keys.device)
        tops, masses = torch.empty((2, *size), dtype=torch.float32, device=keys.device)
    _attend_tile[(num_tiles, kv_heads, chunks * splits)](
        query,
        query.stride(0),
        keys,
        values,
        output,
        output.stride(0),
        totals,
        tops,
        masses,
        paged.tiles,
        paged.first,
        paged.end,
        paged.pages,
        scale * _LOG2_E,
        SHARED=shared,
        KV_HEADS=kv_heads,
        WIDTH=width,
        PAGE=paged.page_size,
        TILE=paged.tile,
        SPLITS=splits,
        IS_WINDOWED=windowed,
        # The interpreter multiplies no bfloat16.
        IS_WIDE=not keys.is_cuda,
        **plan.constants(),
        **plan.options(),
    )
    if splits > 1:
        join_parts(
            totals, tops, masses, output, paged.tiles, shared=shared, tile=paged.tile, heads=plan.heads
        )
