"""Eight-bit floating-point weights on a GPU: one scale per output, and activations that each row scales.

A row's scale does not depend on its neighbours. Products are summed in float32 by the tensor cores of a
compute capability of 8.9 or later; elsewhere the same numbers are multiplied in float32, for tests. Letters:
N rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.models.kernels import run_on

FP8 = torch.float8_e4m3fn
# The largest number of four exponent and three mantissa bits.
LARGEST = 448.0
# Scales of rows of zeros.
_LEAST = 1e-12


def fp8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return f8[..., O, I] and the scale f32[..., O, 1] of each output: the largest is 448."""
    wide = weight.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_(min=_LEAST) / LARGEST
    return (wide / scale).clamp_(-LARGEST, LARGEST).to(FP8), scale


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return f8[N, I] and the scale f32[N, 1] of each row."""
    if run_on(x):
        from sfumato.models.kernels.narrowing import narrow_rows

        return narrow_rows(x, LARGEST, _LEAST)
    return fp8_weight(x)


@cache
def has_fp8(device: torch.device | str) -> bool:
    """Whether a device's tensor cores multiply such numbers."""
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Linear:
    """y = x W^T + b with a weight f8[O, I] and its scale f32[O, 1]."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self._weight = weight
        self._scale = scale.float().view(1, -1).contiguous()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return [N, O] in x's dtype; x: [N, I]."""
        if not len(x):
            return x.new_empty(0, len(self._weight))
        rows, scale = fp8_rows(x)
        if has_fp8(x.device):
            # Its rows are scaled behind the sum; what it returns is bfloat16.
            y: Tensor = torch._scaled_mm(
                rows, self._weight.t(), scale_a=scale, scale_b=self._scale, out_dtype=torch.bfloat16
            )
        else:
            y = F.linear(rows.float(), self._weight.float()).mul_(self._scale).mul_(scale)
        return (y if bias is None else y + bias).to(x.dtype)
