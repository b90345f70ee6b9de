"""Answers of a step on their way from the device to the host, without a wait in between."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopies:
    """Copies of one step's tensors; on a CPU there is nothing to copy.

    On a GPU each goes to pinned memory behind the kernels that compute it, and `wait` returns once the device
    has got there; what was launched behind it goes on meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.Event(device) if device.type == "cuda" else None

    def take(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the host that holds the values once `wait` has returned."""
        if self._event is None:
            return tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)

    def take_if(self, tensor: Tensor | None) -> Tensor | None:
        """Return None for None."""
        return None if tensor is None else self.take(tensor)

    def seal(self) -> None:
        """Note that all of the step's tensors have been taken."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Return when all values are there."""
        if self._event is not None:
            self._event.synchronize()
