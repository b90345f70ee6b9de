"""From the host to the device, without a wait for what runs there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def placed(values: NDArray[Any] | Tensor | list[Any], device: torch.device | str) -> Tensor:
    """Return values on the device. A plain `.to` would first wait for everything that has been launched."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values)
    elif not isinstance(values, Tensor):
        values = torch.tensor(values)
    return values.to(device, non_blocking=True)
