"""Attention by installed libraries, for forwards that are not recorded; each is imported when asked for.

What they compute, `models/paged.py` says; what they cannot express is computed there.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import cast

import numpy as np
import torch

from sfumato.errors import ConfigError
from sfumato.models.attending.pool import Pool
from sfumato.models.attending.sequences import Adapter, Sequences

__all__ = ["Adapter", "Attention", "Pool", "adapter_of", "is_installed"]

# The module whose `make_adapter` takes a pool, and what it imports one of.
_ADAPTERS = {
    "flash-attn": ("sfumato.models.attending.flash_attention", ("flash_attn_interface", "flash_attn")),
    "flashinfer": ("sfumato.models.attending.flash_infer", ("flashinfer",)),
}
# Queries of a trial's longer sequence. Libraries choose kernels by them, and some compile them then: better
# now than in front of a request.
_TRIALS = (2, 80)
# Results are sums of numbers around 1 in bfloat16.
_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class Attention:
    """What computes attention over pages.

    has_kernels: our own kernels, where they run; else grouped SDPA. adapter: a library's, for what it can
    express of the forwards that are not recorded.
    """

    has_kernels: bool = True
    adapter: Adapter | None = None


def is_installed(name: str) -> bool:
    """Whether a library is here; it may still be unable to run."""
    return any(find_spec(module) is not None for module in _ADAPTERS[name][1])


def adapter_of(name: str, pool: Pool) -> Adapter:
    """Return a library's adapter, after a small trial. Raises ConfigError that says in one line why not.

    Waits for the device.
    """
    adapter = cast(Adapter, import_module(_ADAPTERS[name][0]).make_adapter(pool))
    for longest in _TRIALS:
        try:
            error = _trial(adapter, pool, longest)
        except Exception as failure:
            # A compiler that is missing, a kernel that was not built: others' code fails in any way.
            first = str(failure).strip().splitlines()
            raise ConfigError(f"{type(failure).__name__}: {first[0] if first else 'no message'}") from failure
        if not error < _TOLERANCE:
            raise ConfigError(f"a trial's results are {error:.3g} away from what they should be")
    return adapter


def _trial(adapter: Adapter, pool: Pool, longest: int) -> float:
    """Return how far results are from plain torch's, of `longest` queries over two pages and of one."""
    kv_heads, width = pool.shapes[0]
    size = pool.page_size
    generator = torch.Generator().manual_seed(0)
    query = torch.randn((longest + 1, kv_heads, width), generator=generator).to(pool.dtype)
    pages = torch.randn((2, 3, size, kv_heads, width), generator=generator).to(pool.dtype)
    lengths, num_keys, tables = [longest, 1], [size + 1, 1], [[2, 0], [1]]
    keys, values = pages.to(pool.device)
    compute = adapter.plan(
        Sequences(
            np.asarray(lengths, dtype=np.int32),
            np.asarray(num_keys, dtype=np.int32),
            [np.asarray(table, dtype=np.int32) for table in tables],
            size,
        )
    )
    found = compute(query.to(pool.device), keys, values, 0.1).float().cpu()
    expected = []
    for own, count, table in zip(query.float().split(lengths), num_keys, tables, strict=True):
        key, value = pages[:, table].float().flatten(1, 2)[:, :count]
        weights = (torch.einsum("qhd,khd->hqk", own, key) * 0.1).softmax(-1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, value))
    return float((found - torch.cat(expected)).abs().max())
