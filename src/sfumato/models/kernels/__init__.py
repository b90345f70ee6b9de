"""Kernels of our own, in Triton, and where they run; plain torch forms beside their callers say what they do.

Nothing here imports triton before a tensor lies on a GPU: the builds of torch for CUDA bring it, those for
CPUs do not.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


@cache
def has_triton() -> bool:
    """Whether kernels can be compiled here."""
    return find_spec("triton") is not None


def run_on(tensor: Tensor) -> bool:
    """Whether kernels compute with such tensors: those on a GPU, where triton is installed."""
    return tensor.is_cuda and has_triton()
