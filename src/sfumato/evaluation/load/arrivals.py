"""When requests are sent: so many at once, or at a rate, whatever the server makes of it."""

from __future__ import annotations

import itertools
import math
import random

import msgspec


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How requests arrive.

    rate: requests per second, inf for all at once; None is a closed loop, in which a request is sent when one
    before it has ended. burstiness: of the gaps' gamma law; 1 is Poisson, less comes in bursts, more is even.
    concurrency: how many may be open; in an open loop a later one waits here, and its latency runs.
    """

    rate: float | None = None
    burstiness: float = 1.0
    concurrency: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether requests come without regard to those that are not answered."""
        return self.rate is not None

    @property
    def label(self) -> str:
        """Return what tells this load from others of a sweep."""
        if self.rate is None:
            return f"{self.concurrency} at once"
        rate = "all at once" if math.isinf(self.rate) else f"{self.rate:g}/s"
        return rate if self.concurrency is None else f"{rate}, at most {self.concurrency} open"


def arrival_times(load: Load, count: int, seed: int) -> list[float]:
    """Return when each request is due, in seconds from the start; all at once where nothing spreads them."""
    if load.rate is None or math.isinf(load.rate):
        return [0.0] * count
    source = random.Random(seed)
    scale = 1.0 / (load.rate * load.burstiness)
    gaps = [source.gammavariate(load.burstiness, scale) for _ in range(count - 1)]
    return [0.0, *itertools.accumulate(gaps)][:count]
