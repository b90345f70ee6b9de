"""What became of one request: when what came, and what it cost."""

from __future__ import annotations

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One request; times in seconds from the start of the run, on a monotonic clock.

    due: when it was to be sent. chunks: when each piece of text, or each preview, came. prompt_tokens, nfe:
    as the server reports them. output_tokens: as the server reports them, or counted by the tokenizer or,
    without one, by pieces of text (counted_by).
    """

    index: int
    due: float
    sent: float
    ended: float
    chunks: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    counted_by: str | None = None
    nfe: int | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def is_ok(self) -> bool:
        """Whether it was answered to its end."""
        return self.error is None

    @property
    def lag(self) -> float:
        """Return how much later than due it was sent."""
        return self.sent - self.due

    @property
    def time_to_first(self) -> float | None:
        """Return the time to its first text or preview, from when it was due; None where none came."""
        return self.chunks[0] - self.due if self.chunks else None

    @property
    def end_to_end(self) -> float:
        """Return the time to its end, from when it was due."""
        return self.ended - self.due

    @property
    def per_token(self) -> float | None:
        """Return the time per output token behind the first; None where there is none.

        As other benchmarks have it: a first piece of many tokens counts as one.
        """
        if not self.chunks or self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Return the times between its pieces."""
        return [later - earlier for earlier, later in zip(self.chunks, self.chunks[1:], strict=False)]
