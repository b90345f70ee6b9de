"""Shared weights: ranks with requests and keys of their own meet in the layers whose weights are divided.

In such a layer the tokens of all ranks are gathered, each rank computes its part of the weights for all of
them, and each takes back the sums of its own. A rank without tokens takes part with none.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sfumato.errors import EngineError
from sfumato.parallel.groups import Group

# Between two looks at a device that is replaying.
_POLL_SECONDS = 2e-5


class MeetingRanks:
    """Ranks that hold the divided layers together; the group is there once they have met.

    num_met: how many layers of the present forward all ranks have computed.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.group: Group | None = None
        self.num_met = 0
        # Tokens of each rank in the layer where they are now, and how many of this one's are its own.
        self._counts: list[int] | None = None
        self._num_own = 0
        # With how many tokens every rank enters, whatever it has; None: the ranks ask one another.
        self._num_filled: int | None = None

    def _group(self) -> Group:
        if self.group is None:
            raise EngineError(f"rank {self.rank} of {self.size} was used before the ranks met")
        return self.group

    def enter(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Return what all ranks enter with, [N', ...] each in rank order; parts: [N, ...] of this one."""
        group, device = self._group(), parts[0].device
        self._num_own = len(parts[0])
        counts = self._counts = self._ask()
        # One message for all of them, whatever their dtypes are.
        widths = [part.shape[1] * part.element_size() for part in parts]
        padded = torch.zeros(max(counts), sum(widths), dtype=torch.uint8, device=device)
        torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1, out=padded[: len(parts[0])])
        found = group.all_gather(padded)
        joined = torch.cat([own[:count] for own, count in zip(found, counts, strict=True)])
        entered, first = [], 0
        for part, width in zip(parts, widths, strict=True):
            # A copy, also of a single row: only a dense one can be read as another dtype.
            own = joined[:, first : first + width].clone(memory_format=torch.contiguous_format)
            entered.append(own.view(part.dtype))
            first += width
        return tuple(entered)

    def _ask(self) -> list[int]:
        """Return with how many tokens each rank enters."""
        if self._num_filled is not None:
            return [self._num_filled] * self.size
        return [count for (count,) in self.exchange((self._num_own,))]

    def exchange(self, numbers: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return every rank's numbers, in rank order; on the CPU, where they are needed."""
        rows = self._group().all_gather(torch.tensor(numbers))
        return [tuple(row.tolist()) for row in rows]

    def wait_for(self, is_done: Callable[[], bool]) -> None:
        """Wait until a device is done with exchanges that nobody watches, as those of a replayed graph.

        Raises EngineError where that takes longer than one rank may keep the others waiting.
        """
        seconds = self._group().seconds
        end = time.monotonic() + seconds
        while not is_done():
            if time.monotonic() > end:
                raise EngineError(
                    f"rank {self.rank} of {self.size} lost the others: a replayed forward is not done after "
                    f"{seconds:g} s"
                )
            time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def filled_up(self, num_tokens: int) -> Iterator[None]:
        """Let every rank enter with so many tokens, zeros behind its own: all of them do, and nobody asks."""
        self._num_filled = num_tokens
        try:
            yield
        finally:
            self._num_filled = None

    def leave(self, partial: Tensor) -> Tensor:
        """Return this rank's rows of the sum of all ranks' partial results [N', width]."""
        counts, self._counts = self._counts, None
        assert counts is not None, "a layer is entered before it is left"
        total = self._group().sum_(partial.contiguous())
        self.num_met += 1
        first = sum(counts[: self.rank])
        return total[first : first + self._num_own]

    def sum(self, x: Tensor) -> Tensor:
        """Refuse: only whole layers are divided."""
        raise EngineError("ranks with tokens of their own have nothing to add up outside of their layers")

    def join(self, part: Tensor, total: int) -> Tensor:
        """Refuse: only whole layers are divided."""
        raise EngineError("ranks with tokens of their own have no parts to join")
