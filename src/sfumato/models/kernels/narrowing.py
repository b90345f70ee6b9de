"""Rows in eight bits: the largest number found and all of them divided, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _narrow_rows(x, x_stride, narrow, scales, size, largest, least, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    is_there = at < size
    values = tl.load(x + row * x_stride + at, mask=is_there, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0), least) / largest
    scaled = tl.minimum(tl.maximum(values / scale, -largest), largest)
    tl.store(narrow + row * size + at, scaled.to(narrow.dtype.element_ty), mask=is_there)
    tl.store(scales + row, scale)


def narrow_rows(x: Tensor, largest: float, least: float) -> tuple[Tensor, Tensor]:
    """Return f8[N, I] and the scale f32[N, 1] of each row of x [N, I], whose largest becomes `largest`."""
    num_rows, size = x.shape
    narrow = torch.empty((num_rows, size), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(size)
    assert x.stride(1) == 1
    _narrow_rows[(num_rows,)](
        x,
        x.stride(0),
        narrow,
        scales,
        size,
        largest,
        least,
        WIDTH=width,
        num_warps=min(8, max(1, width // 512)),
    )
    return narrow, scales
