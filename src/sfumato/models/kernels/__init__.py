"""Kernels of our own, in Triton, and where they run; plain torch forms beside their callers say what they do.

Nothing here imports triton before a tensor lies on a GPU: the builds of torch for CUDA bring it, those for
CPUs do not.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def run_on(tensor: Tensor) -> bool:
    """Whether kernels compute with such tensors: those on a GPU on which they have been seen to run."""
    return tensor.is_cuda and why_not(tensor.device) is None


@cache
def why_not(device: torch.device) -> str | None:
    """Return why no kernel runs on a GPU, None where they do: a small one is compiled and run to find out.

    What it says is printed once. Waits for the device, once.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        _try(device)
    except Exception as error:
        # A compiler that is missing, a driver that is too old: everything has a form in torch.
        first = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {first[0] if first else 'no message'}"
        print(f"sfumato: {device} runs no Triton kernel: {reason}", file=sys.stderr, flush=True)
        return reason
    return None


def _try(device: torch.device) -> None:
    """Run the smallest kernel. Raises RuntimeError where it computes something else than it should."""
    from sfumato.models.kernels.keeping import keep_rows

    key = torch.arange(32.0, device=device).view(2, 1, 16)
    keys, values = torch.zeros((2, 4, 1, 16), device=device)
    keep_rows(key, key + 1, keys, values, torch.tensor([3, -1], device=device))
    if not bool((keys[3] == key[0]).all()) or float(values.sum()) != float((key[0] + 1).sum()):
        raise RuntimeError("a kernel that copies rows copied something else")
