"""Windows that have advanced on the device, while the host does not know the outcome yet.

Letters: R rows of one algorithm, W window positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Advanced:
    """R windows behind a step: token_ids i64[R, W], undecided bool[R, W], states of the algorithm."""

    token_ids: Tensor
    undecided: Tensor
    states: Sequence[Any] | None


@dataclass(frozen=True, slots=True)
class AdvancedRow:
    """One of them."""

    windows: Advanced
    row: int

    @property
    def token_ids(self) -> Tensor:
        """Return i64[W]."""
        return self.windows.token_ids[self.row]

    @property
    def state(self) -> Any:
        """Return the algorithm's state."""
        return None if self.windows.states is None else self.windows.states[self.row]
