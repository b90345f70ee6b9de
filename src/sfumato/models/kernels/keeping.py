"""Keys and values of a forward written to their slots in one launch.

Letters: N packed tokens, K key-value heads, D head width, S slots.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _keep_rows(key, value, key_stride, value_stride, keys, values, slots, size, WIDTH: tl.constexpr):
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_there = (at < size) & (tl.broadcast_to(slot, [WIDTH]) >= 0)
    offset = token.to(tl.int64)
    tl.store(keys + slot * size + at, tl.load(key + offset * key_stride + at, mask=is_there), mask=is_there)
    tl.store(
        values + slot * size + at, tl.load(value + offset * value_stride + at, mask=is_there), mask=is_there
    )


def keep_rows(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, write_slots: Tensor) -> None:
    """Write key, value: [N, K, D] to slots i64[N] of keys, values: [S, K, D]; slot -1 is none. In place.

    Where the heads of a token lie together nothing is copied before; tokens may have a stride.
    """
    num_tokens, heads, width = key.shape
    if not num_tokens:
        return
    key, value = (part if part.stride()[1:] == (width, 1) else part.contiguous() for part in (key, value))
    size = heads * width
    block = min(1024, triton.next_power_of_2(size))
    _keep_rows[(num_tokens, triton.cdiv(size, block))](
        key, value, key.stride(0), value.stride(0), keys, values, write_slots, size, WIDTH=block, num_warps=4
    )
