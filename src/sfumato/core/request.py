"""A request and the protocol of the work it owns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from sfumato.core.messages import CanvasView, FinishReason, Score, TokenLogprob, Usage
from sfumato.core.plan import Row, RowKind, RowResult


class Status(StrEnum):
    """Where a request stands with the scheduler; its phase is derived from its work.

    AWAY: it holds pages, and its next rows are a peer's.
    """

    WAITING = "waiting"
    RUNNING = "running"
    AWAY = "away"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Progress:
    """What one or more row results brought: tokens that can no longer change, a canvas, perhaps an end."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    canvas: CanvasView | None = None
    score: Score | None = None
    finish_reason: FinishReason | None = None


class Lease(Protocol):
    """Pages that one request holds."""

    pages: list[int]


class Work(Protocol):
    """The denoise state of one request, as the scheduler and the loop see it."""

    def phase(self) -> RowKind:
        """Return PREFILL while known tokens lack keys and values, else DENOISE."""
        ...

    def rows(self, request_id: str, max_tokens: int) -> tuple[Row, ...]:
        """Return the rows of the next step; a prefill takes at most max_tokens, but at least one block."""
        ...

    def pages_for(self, rows: tuple[Row, ...]) -> int:
        """Return how many pages the request must hold to run these rows."""
        ...

    def pages_to_progress(self) -> int:
        """Return how many pages let the request reach its next decision."""
        ...

    def pages_at_most(self) -> int:
        """Return how many pages the request can ever hold."""
        ...

    def remaining(self) -> int:
        """Return about how many tokens its forwards are still to be fed."""
        ...

    def known_tokens(self) -> tuple[int, ...]:
        """Return the tokens of whole known blocks, whose keys and values may be shared; empty if none may."""
        ...

    def cache_key(self) -> str:
        """Return what besides the tokens decides their keys and values."""
        ...

    @property
    def block_length(self) -> int:
        """Return how many tokens are committed, and cached, together."""
        ...

    def resume_at(self, cached_len: int) -> None:
        """Take the first cached_len positions' keys and values as present, and no others."""
        ...

    def cached_len(self) -> int:
        """Return how many leading positions have final keys and values."""
        ...

    def arrive(self, cached_len: int, nfe: int) -> None:
        """Take keys and values up to cached_len as present that a peer computed with nfe forwards."""
        ...

    def advance(self, results: list[RowResult]) -> Progress:
        """Apply the results of one step's rows."""
        ...

    def usage(self) -> Usage:
        """Return what the request has cost so far."""
        ...


@dataclass(slots=True)
class Request:
    """One accepted request; only `engine/` writes what is not its work's.

    arrival: order of arrival, unique. deadline: on the engine's clock. last_step: launch that last ran it.
    is_protected: it was let in because it had waited too long, and no priority pushes it out again.
    """

    id: str
    work: Work
    arrival: int
    arrived_at: float
    priority: int = 0
    deadline: float | None = None
    status: Status = Status.WAITING
    lease: Lease | None = None
    last_step: int = -1
    retractions: int = 0
    is_protected: bool = False
    waiting_since: float = 0.0
    started_at: float | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
