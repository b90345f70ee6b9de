"""FlashInfer over pages: its wrapper for prefills, planned once per forward and run in every layer.

Called as flashinfer 0.7.4 publishes it.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.models.attending.pool import Pool, imported
from sfumato.models.attending.sequences import Adapter, Sequences, starts_of
from sfumato.models.paged import Compute
from sfumato.models.placing import placed

_WIDTHS = (64, 128, 256)
# What FlashInfer recommends, in bytes.
_WORKSPACE = 128 << 20
# A plan lies in memory of its wrapper's that is copied behind what runs. Two launches may be under way, each
# with a plan for full layers and one for sliding ones.
_NUM_WRAPPERS = 4


def make_adapter(pool: Pool) -> Adapter:
    """Return the adapter. Raises ConfigError where it cannot be used."""
    pool.check()
    if len(set(pool.shapes)) > 1:
        raise ConfigError("it plans all layers at once, and those of this model have different heads")
    width = pool.shapes[0][1]
    if width not in _WIDTHS:
        raise ConfigError(f"heads of {width} are none of {', '.join(map(str, _WIDTHS))}")
    return FlashInfer(pool)


class FlashInfer:
    """A few wrappers, taken in turn, that share the memory of intermediate results."""

    def __init__(self, pool: Pool) -> None:
        make = imported("flashinfer").BatchPrefillWithPagedKVCacheWrapper
        self._device = pool.device
        workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=pool.device)
        self._wrappers: deque[Any] = deque(make(workspace, "NHD") for _ in range(_NUM_WRAPPERS))

    def plan(self, sequences: Sequences) -> Compute:
        """Return what computes these sequences; the first layer, which shows the heads, plans for all."""
        wrapper = self._wrappers[0]
        self._wrappers.rotate(-1)
        pages = placed(np.concatenate(sequences.pages), self._device)
        is_planned = False

        def compute(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
            nonlocal is_planned
            if not is_planned:
                _plan(wrapper, sequences, pages, query, keys, scale)
                is_planned = True
            seen: Tensor = wrapper.run(query, (keys, values))
            return seen

        return compute


def _plan(
    wrapper: Any, sequences: Sequences, pages: Tensor, query: Tensor, keys: Tensor, scale: float
) -> None:
    counts = np.asarray([len(own) for own in sequences.pages], dtype=np.int32)
    last = (sequences.num_keys - 1) % sequences.page_size + 1
    # It plans on the host: what lies there already need not be waited for.
    wrapper.plan(
        torch.from_numpy(sequences.starts),
        torch.from_numpy(starts_of(counts)),
        pages,
        torch.from_numpy(last.astype(np.int32)),
        query.shape[1],
        keys.shape[2],
        keys.shape[3],
        sequences.page_size,
        causal=False,
        sm_scale=scale,
        q_data_type=query.dtype,
        kv_data_type=keys.dtype,
    )
