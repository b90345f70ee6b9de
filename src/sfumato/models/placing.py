"""From the host to the device, without a wait for what runs there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# CUDA takes so many bytes of ordinary memory along with the call; more would wait for what runs.
_STAGED_BYTES = 32 << 10


def placed(values: NDArray[Any] | Tensor | list[Any], device: torch.device | str) -> Tensor:
    """Return values on the device. A plain `.to` would first wait for everything that has been launched."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values)
    elif not isinstance(values, Tensor):
        values = torch.tensor(values)
    if torch.device(device).type != "cpu" and values.nbytes > _STAGED_BYTES and not values.is_cuda:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def place_into(target: Tensor, values: NDArray[Any]) -> None:
    """Put values at the beginning of a tensor of their dtype on the device, without a wait."""
    source = torch.from_numpy(values)
    if target.is_cuda:
        source = source.pin_memory()
    target[: len(source)].copy_(source, non_blocking=True)
