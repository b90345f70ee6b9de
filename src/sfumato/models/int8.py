"""Eight-bit weights on a CPU: one scale per output, and activations that each row scales for itself.

Products of eight-bit integers are summed exactly, so that a row's result does not depend on its neighbours in
a single bit. Letters: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST = 127


def quantized_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return i8[..., O, I] and the scale f32[..., O, 1] of each output: symmetric, the largest is 127."""
    wide = weight.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / _LARGEST
    return (wide / scale).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8), scale


def quantized_rows(x: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """Return u8[N, I] around `zero` and the scale f32[N, 1] of each row: x is about (u8 - zero) * scale."""
    wide = x.float()
    largest = torch.maximum(wide.amax(-1, keepdim=True), wide.amin(-1, keepdim=True).neg_())
    scale = largest.clamp_(min=torch.finfo(torch.float32).tiny * zero).div_(zero - 1)
    # Signed first: that cast has a vector form, and bytes wrap around.
    signed = (wide * scale.reciprocal()).round_().to(torch.int8)
    return signed.view(torch.uint8).add_(zero), scale


class Int8Linear:
    """y = x W^T + b with a weight i8[O, I] and its scale f32[O, 1], laid out once where oneDNN is there."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self._scale = scale.float().flatten().contiguous()
        self._zeros = torch.zeros(len(self._scale), dtype=torch.int64)
        self._zero = zero_point()
        self._packed: Tensor | None = None
        self._plain = weight
        if self._zero:
            self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
            self._plain = weight.new_empty(0)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return [N, O] in x's dtype; x: [N, I]."""
        if not len(x):
            return x.new_empty(0, len(self._scale))
        zero = self._zero or 128
        rows, scale = quantized_rows(x, zero)
        if self._packed is None:
            y = F.linear(rows.float() - zero, self._plain.float()) * self._scale
        else:
            y = _product(rows, zero, self._packed, self._scale, self._zeros)
        y.mul_(scale)
        return (y if bias is None else y.add_(bias)).to(x.dtype)


def _product(rows: Tensor, zero: int, packed: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """Return f32[N, O]. The operator is private to torch; this file is its only user."""
    result: Tensor = torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, zero, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return result


@cache
def zero_point() -> int:
    """Return the middle of the unsigned numbers that this CPU multiplies exactly: 128, or 64.

    0 where oneDNN has no such product. Without VNNI two products of eight-bit numbers are summed in sixteen
    bits, which hold them only if one factor has seven.
    """
    weight = torch.full((16, 64), _LARGEST, dtype=torch.int8)
    rows = torch.full((2, 64), 255, dtype=torch.uint8)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        found = _product(rows, 0, packed, torch.ones(16), torch.zeros(16, dtype=torch.int64))
    except (AttributeError, RuntimeError):
        return 0
    return 128 if bool((found == 255 * _LARGEST * 64).all()) else 64
