"""Weights laid out once for a CPU's matrix products; elsewhere they stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor

# Outputs of one of MKL's products: few enough that what is read of the weight at a time stays in a cache.
_OUTPUTS = 1280
# More outputs than any layer has: those of an output head, which multiplies few rows.
_HEAD_OUTPUTS = 16384
# With fewer rows MKL sums in another order: a row's answer would depend on whether it is alone.
_FEWEST_ROWS = 4


class BlockedWeight:
    """A weight in oneDNN's blocked layout.

    The operators are private to torch; this class is the only user.
    """

    def __init__(self, weight: Tensor) -> None:
        """Reorder [out, in]. Raises AttributeError or RuntimeError where torch has no such operators."""
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self(weight.new_zeros(1, weight.shape[1]), None)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias of x: [N, in]."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")
        return result


class AcrossWeight:
    """A weight as [in, out], in parts of some outputs, for MKL's products."""

    def __init__(self, weight: Tensor) -> None:
        self._num_outputs = len(weight)
        self._parts = [part.detach().t().contiguous() for part in weight.split(_OUTPUTS)]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias of x: [N, in]."""
        num_rows = len(x)
        if 0 < num_rows < _FEWEST_ROWS:
            x = torch.nn.functional.pad(x, (0, 0, 0, _FEWEST_ROWS - num_rows))
        result = x.new_empty(len(x), self._num_outputs)
        begin = 0
        for part in self._parts:
            span = slice(begin, begin + part.shape[1])
            if bias is None:
                torch.mm(x, part, out=result[:, span])
            else:
                torch.addmm(bias[span], x, part, out=result[:, span])
            begin = span.stop
        return result[:num_rows]


PackedWeight = BlockedWeight | AcrossWeight


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; imitating it takes three times as long as float32."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_blocked(weight: Tensor) -> BlockedWeight | None:
    """Return a weight [out, in] in oneDNN's layout, or None where that is not available."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if weight.dtype is torch.bfloat16 and not has_bfloat16():
        return None
    try:
        return BlockedWeight(weight)
    except (AttributeError, RuntimeError):
        return None


def pack_weight(weight: Tensor) -> PackedWeight | None:
    """Return a layer's weight [out, in] in the layout that this machine multiplies best, None for as it is.

    Of float32 on one thread without AVX-512 MKL's products are faster than oneDNN's, by an eighth from 128
    rows on; on several threads oneDNN's are. Neither lets a row's answer depend on the rows beside it, but
    they differ from each other: one layout is for all numbers of rows.
    """
    if weight.device.type == "cpu" and weight.dtype is torch.float32 and _has_quick_products(len(weight)):
        return AcrossWeight(weight)
    return pack_blocked(weight)


def _has_quick_products(num_outputs: int) -> bool:
    return (
        torch.get_num_threads() == 1
        and num_outputs < _HEAD_OUTPUTS
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    )
