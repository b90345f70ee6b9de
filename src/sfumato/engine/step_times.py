"""How a step's time grows with its tokens, learnt from the steps that ran."""

from __future__ import annotations

from dataclasses import dataclass

# A step of text is large enough where it runs at this share of the rate that an endless one would have: what
# less gives up of the throughput, and more of the latency of short requests, is in docs/benchmarks.md.
TEXT_SHARE = 0.92
# What an observation still weighs after the next one.
_MEMORY = 0.98
_MIN_WEIGHT = 8.0
UNLIMITED = 1 << 30


@dataclass(slots=True)
class StepTimes:
    """A line through (tokens, seconds), older steps weighing less.

    A step of n tokens takes a + b n seconds and runs at b n / (a + b n) of the rate that it nears: small
    steps waste the time a that every step costs, and beyond some size there is nothing left to gain.
    share: of that rate which is enough.
    """

    share: float = TEXT_SHARE
    _weight: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _tokens_squared: float = 0.0
    _product: float = 0.0

    def note(self, num_tokens: int, seconds: float) -> None:
        """Take in one step."""
        self._weight = self._weight * _MEMORY + 1.0
        self._tokens = self._tokens * _MEMORY + num_tokens
        self._seconds = self._seconds * _MEMORY + seconds
        self._tokens_squared = self._tokens_squared * _MEMORY + num_tokens * num_tokens
        self._product = self._product * _MEMORY + num_tokens * seconds

    def enough_tokens(self) -> int:
        """Return how many tokens fill a step; UNLIMITED while steps were too few or too alike to tell."""
        if self._weight < _MIN_WEIGHT:
            return UNLIMITED
        mean = self._tokens / self._weight
        spread = self._tokens_squared / self._weight - mean * mean
        if spread <= 0.01 * mean * mean:
            return UNLIMITED
        mean_seconds = self._seconds / self._weight
        per_token = (self._product / self._weight - mean * mean_seconds) / spread
        if per_token <= 0.0:
            return UNLIMITED
        fixed = max(0.0, mean_seconds - per_token * mean)
        return max(1, int(self.share / (1 - self.share) * fixed / per_token))
