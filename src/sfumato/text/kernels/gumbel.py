"""The counter-based noise of `CounterSource.gumbel`, number by number inside a kernel: equal in every bit of
the hash, and in the arithmetic behind it up to the device's logarithm.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sfumato.text import random_source

_GAMMA = tl.constexpr(random_source.GAMMA)
_MIX_1 = tl.constexpr(random_source.MIX_1)
_MIX_2 = tl.constexpr(random_source.MIX_2)
_LARGEST_UNIFORM = tl.constexpr(random_source.LARGEST_UNIFORM)


@triton.jit
def gumbel(key, index):
    """Return noise f32 of vocabulary indices i32 under a position's key i64."""
    bits = ((index + 1).to(tl.uint64) * _GAMMA) ^ key.to(tl.uint64, bitcast=True)
    bits = (bits ^ (bits >> 30)) * _MIX_1
    bits = (bits ^ (bits >> 27)) * _MIX_2
    bits = bits ^ (bits >> 31)
    uniform = ((bits >> 40).to(tl.float32) + 0.5) * (1.0 / (1 << 24))
    uniform = tl.minimum(uniform, _LARGEST_UNIFORM)
    return -tl.log(-tl.log(uniform))
