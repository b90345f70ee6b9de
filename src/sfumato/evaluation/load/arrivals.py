"""When requests are sent: so many at once, or at a rate, whatever the server makes of it."""

from __future__ import annotations

import itertools
import random

import msgspec


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How requests arrive.

    is_open: without regard to those that are not answered; in a closed loop one is sent when another has
    ended. rate: requests per second of an open loop, None for all at once. burstiness: of the gaps' gamma
    law; 1 is Poisson, less comes in bursts, more is even. concurrency: how many may be open; in an open loop
    a later one waits here, and its latency runs.
    """

    is_open: bool = False
    rate: float | None = None
    burstiness: float = 1.0
    concurrency: int | None = None

    @property
    def label(self) -> str:
        """Return what tells this load from others of a sweep."""
        if not self.is_open:
            return f"{self.concurrency} at once"
        limit = "" if self.concurrency is None else f", at most {self.concurrency} open"
        return f"{self.short}{limit}"

    @property
    def short(self) -> str:
        """Return what is swept, for a picture."""
        if not self.is_open:
            return str(self.concurrency)
        return "all at once" if self.rate is None else f"{self.rate:g}/s"


def arrival_times(load: Load, count: int, seed: int) -> list[float]:
    """Return when each request is due, in seconds from the start; all at once where nothing spreads them."""
    if load.rate is None:
        return [0.0] * count
    source = random.Random(seed)
    scale = 1.0 / (load.rate * load.burstiness)
    gaps = [source.gammavariate(load.burstiness, scale) for _ in range(count - 1)]
    return [0.0, *itertools.accumulate(gaps)][:count]
