"""A request and the protocol of the work it owns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from sfumato.core.messages import (
    CanvasView,
    FinishReason,
    Picture,
    Score,
    StepProgress,
    TokenLogprob,
    Usage,
)
from sfumato.core.plan import Cost, Row, RowKind, RowResult


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
    step: StepProgress | None = None
    pictures: tuple[Picture, ...] = ()
    finish_reason: FinishReason | None = None

    @property
    def is_news(self) -> bool:
        """Whether there is anything to tell of a request that goes on."""
        return bool(self.token_ids or self.pictures) or self.canvas is not None or self.step is not None


class Lease(Protocol):
    """Pages that one request holds."""

    pages: list[int]


@dataclass(frozen=True, slots=True)
class Missing:
    """Known tokens without keys that must be fed before the next denoise step, as plain data.

    [start, end) in whole units of `unit` tokens; or `feeds`: rows that must be fed one after another, as they
    are.
    """

    start: int = 0
    end: int = 0
    unit: int = 1
    feeds: tuple[Row, ...] = ()

    def row(self, request_id: str, max_tokens: int) -> Row:
        """Return the next row: about max_tokens, one unit at least; a feed cannot be cut."""
        if self.feeds:
            return self.feeds[0]
        end = min(self.end, self.start + max(self.unit, max_tokens // self.unit * self.unit))
        cost = Cost(tokens=end - self.start, rows=1)
        return Row(
            request_id=request_id,
            kind=RowKind.PREFILL,
            start=self.start,
            end=end,
            slot=self.start,
            cost=cost,
        )

    def after(self, row: Row) -> Missing | None:
        """Return what is missing behind a row, or None."""
        if self.feeds:
            return Missing(feeds=self.feeds[1:]) if len(self.feeds) > 1 else None
        return Missing(row.end, self.end, self.unit) if row.end < self.end else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a request's work stands, as plain data: all that the scheduler plans with.

    missing: what must be fed before the next denoise step; None: nothing. denoise: that step's rows.
    pages_ahead: pages that hold whatever step may come behind `denoise`; None: its rows depend so much on the
    outcome that it must be waited for. pages_to_progress: pages that let the request reach its next decision.
    pages_at_most: that it can ever hold. page_size: 0 where it needs no pages. remaining: about how many
    tokens its forwards are still to be fed. known_tokens: those of whole known blocks, whose keys may be
    shared; empty if none may. cached_len: leading positions with final keys. cache_key: what besides the
    tokens decides their keys. block_length: tokens that are cached, and shared, together.
    is_guess: an outcome that is not known yet may change the rows.
    """

    request_id: str
    missing: Missing | None
    denoise: tuple[Row, ...]
    pages_ahead: int | None = None
    pages_to_progress: int = 0
    pages_at_most: int = 0
    page_size: int = 0
    remaining: int = 0
    known_tokens: tuple[int, ...] = ()
    cached_len: int = 0
    cache_key: str = ""
    block_length: int = 1
    is_guess: bool = False

    @property
    def phase(self) -> RowKind:
        """Return PREFILL while known tokens lack keys and values, else DENOISE."""
        return RowKind.DENOISE if self.missing is None else RowKind.PREFILL

    def rows(self, max_tokens: int) -> tuple[Row, ...]:
        """Return the rows of the next step; a prefill takes at most max_tokens, but at least one block."""
        if self.missing is not None:
            return (self.missing.row(self.request_id, max_tokens),)
        return self.denoise

    def pages_for(self, rows: tuple[Row, ...]) -> int:
        """Return how many pages the request must hold to run these rows."""
        if not self.page_size:
            return 0
        if self.is_guess and self.missing is None:
            return self.pages_ahead or 0
        last = max(max((row.slot or 0) + row.end - row.start, row.visible or 0) for row in rows)
        return -(-last // self.page_size)

    def behind(self, rows: tuple[Row, ...]) -> Standing | None:
        """Return how it will stand behind rows that are in flight, as far as their outcome does not matter.

        None: the outcome must be waited for.
        """
        if rows[0].kind is RowKind.PREFILL and self.missing is not None:
            return replace(self, missing=self.missing.after(rows[0]))
        # What was to be committed has gone with those rows.
        denoise = tuple(row for row in self.denoise if row.kind is not RowKind.COMMIT)
        if rows[0].kind is RowKind.PREFILL:
            return replace(self, denoise=denoise)
        if self.pages_ahead is None:
            return None
        # The block is most likely the same.
        return replace(self, denoise=denoise, is_guess=True)


class Work(Protocol):
    """The denoise state of one request. While a launch of it is in flight, it belongs to its lane."""

    def standing(self, request_id: str) -> Standing:
        """Return where it stands."""
        ...

    def resume_at(self, cached_len: int) -> None:
        """Take the first cached_len positions' keys and values as present, and no others."""
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

    arrival: order of arrival, unique. deadline: on the engine's clock. last_step: the last step that ran it.
    is_protected: it was let in because it had waited too long, and no priority pushes it out again.
    standing: where its work stood after the last result that was applied. usage: what it had cost then.
    in_flight: rows of its launches whose results are not here, oldest first. is_over: written by its lane
    alone: its work has ended or failed, and nothing more of it runs. is_leaving: it will be retracted
    once nothing of it is in flight.
    """

    id: str
    work: Work
    standing: Standing
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
    usage: Usage = Usage()
    in_flight: list[tuple[Row, ...]] = field(default_factory=list)
    is_over: bool = False
    is_leaving: bool = False
