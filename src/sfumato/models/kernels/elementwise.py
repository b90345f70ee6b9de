"""What stands between matrix products, one launch each: norms, rotary positions, gated activations.

Each computes in float32 and rounds where the torch form in `models/layers.py` rounds. Letters: N tokens, D
head width, I inner width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SILU, GELU_TANH = 0, 1


@triton.jit
def _norm(
    x,
    x_stride,
    more,
    total,
    weight,
    output,
    size,
    eps,
    HAS_MORE: tl.constexpr,
    IS_WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    is_there = at < size
    values = tl.load(x + row * x_stride + at, mask=is_there, other=0.0).to(tl.float32)
    if HAS_MORE:
        values += tl.load(more + row * size + at, mask=is_there, other=0.0).to(tl.float32)
        values = values.to(total.dtype.element_ty)
        tl.store(total + row * size + at, values, mask=is_there)
        values = values.to(tl.float32)
    scaled = values * tl.rsqrt(tl.sum(values * values, 0) / size + eps)
    scale = tl.load(weight + at, mask=is_there, other=0.0)
    kind = output.dtype.element_ty
    if IS_WIDE:
        result = (scaled * scale.to(tl.float32)).to(kind)
    else:
        result = (scaled.to(kind).to(tl.float32) * scale.to(tl.float32)).to(kind)
    tl.store(output + row * size + at, result, mask=is_there)


def norm(x: Tensor, weight: Tensor, eps: float, *, is_wide: bool) -> Tensor:
    """Return x [..., width] over its root mean square, times a weight [width]; is_wide: see `RMSNorm`."""
    rows = x.reshape(-1, x.shape[-1])
    return _normed(rows, None, weight, eps, is_wide=is_wide)[1].view(x.shape)


def add_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float, *, is_wide: bool) -> tuple[Tensor, Tensor]:
    """Return x + more, [N, width], and its norm."""
    return _normed(x, more, weight, eps, is_wide=is_wide)


def _normed(
    x: Tensor, more: Tensor | None, weight: Tensor, eps: float, *, is_wide: bool
) -> tuple[Tensor, Tensor]:
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if more is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = triton.next_power_of_2(x.shape[1])
    if len(x):
        assert x.stride(1) == 1
        more = None if more is None else more.contiguous()
        _norm[(len(x),)](
            x,
            x.stride(0),
            x if more is None else more,
            total,
            weight,
            output,
            x.shape[1],
            eps,
            HAS_MORE=more is not None,
            IS_WIDE=is_wide,
            WIDTH=width,
            num_warps=min(8, max(1, width // 512)),
        )
    return total, output


@triton.jit
def _turn(
    x,
    x_stride,
    weight,
    cos,
    sin,
    output,
    heads,
    eps,
    SIZE: tl.constexpr,
    TURNED: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_WIDE: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, WIDTH)
    is_there = at < SIZE
    half: tl.constexpr = TURNED // 2
    # The other dimension of each pair; behind the turned ones, itself.
    other = tl.where(at < half, at + half, tl.where(at < TURNED, at - half, at))
    place = x + token * x_stride + head * SIZE
    values = tl.load(place + at, mask=is_there, other=0.0).to(tl.float32)
    others = tl.load(place + other, mask=is_there, other=0.0).to(tl.float32)
    kind = output.dtype.element_ty
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
        scale = tl.load(weight + at, mask=is_there, other=0.0).to(tl.float32)
        other_scale = tl.load(weight + other, mask=is_there, other=0.0).to(tl.float32)
        if IS_WIDE:
            values = (values * factor * scale).to(kind).to(tl.float32)
            others = (others * factor * other_scale).to(kind).to(tl.float32)
        else:
            values = ((values * factor).to(kind).to(tl.float32) * scale).to(kind).to(tl.float32)
            others = ((others * factor).to(kind).to(tl.float32) * other_scale).to(kind).to(tl.float32)
    is_turned = at < TURNED
    c = tl.load(cos + token * TURNED + at, mask=is_turned, other=1.0)
    s = tl.load(sin + token * TURNED + at, mask=is_turned, other=0.0)
    turned = values * c + tl.where(at < half, -others, others) * s
    result = tl.where(is_turned, turned, values).to(kind)
    tl.store(output + (token * heads + head) * SIZE + at, result, mask=is_there)


def turn(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float = 0.0,
    is_wide: bool = True,
) -> Tensor:
    """Return heads x [N, heads, D], normed with a weight [D] if there is one, rotated by f32[N, 1, width].

    Where the heads of a token lie together nothing is copied before; tokens may have a stride.
    """
    num_tokens, heads, size = x.shape
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if output.numel():
        if x.stride()[1:] != (size, 1):
            x = x.contiguous()
        _turn[(num_tokens, heads)](
            x,
            x.stride(0),
            cos if weight is None else weight,
            cos,
            sin,
            output,
            heads,
            eps,
            SIZE=size,
            TURNED=cos.shape[-1],
            WIDTH=triton.next_power_of_2(size),
            HAS_NORM=weight is not None,
            IS_WIDE=is_wide,
            num_warps=1,
        )
    return output


@triton.jit
def _gate(x, output, size, KIND: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_there = at < size
    gate = tl.load(x + row * 2 * size + at, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + at, mask=is_there, other=0.0).to(tl.float32)
    if KIND == 0:
        active = gate / (1.0 + tl.exp(-gate))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        # tanh by an exponential that cannot overflow.
        power = tl.exp(-2.0 * tl.abs(inner))
        tanh = tl.where(inner < 0.0, -1.0, 1.0) * (1.0 - power) / (1.0 + power)
        active = 0.5 * gate * (1.0 + tanh)
    kind = output.dtype.element_ty
    tl.store(output + row * size + at, (active.to(kind).to(tl.float32) * up).to(kind), mask=is_there)


def gate(x: Tensor, kind: int) -> Tensor:
    """Return activation(gate) * up, [N, I], of x [N, 2 I]: gate first."""
    size = x.shape[1] // 2
    output = torch.empty((len(x), size), dtype=x.dtype, device=x.device)
    if output.numel():
        x = x.contiguous()
        width = min(1024, triton.next_power_of_2(size))
        _gate[(len(x), triton.cdiv(size, width))](x, output, size, KIND=kind, WIDTH=width, num_warps=4)
    return output
