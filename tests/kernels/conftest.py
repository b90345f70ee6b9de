"""Kernels on tensors of the CPU: Triton's interpreter computes with numpy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _unread_lanes_may_overflow() -> Iterator[None]:
    """Lanes whose numbers are not used may be infinite, which numpy warns of and a GPU does not."""
    with np.errstate(all="ignore"):
        yield
