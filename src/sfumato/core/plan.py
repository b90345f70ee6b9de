"""Rows, step plans and step results: what one forward does, and what came of it."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from sfumato.core.messages import StepShare


class RowKind(StrEnum):
    """What a row of a forward is for."""

    PREFILL = "prefill"
    DENOISE = "denoise"
    COMMIT = "commit"
    SCORE = "score"
    ENCODE = "encode"
    DECODE = "decode"


ALL_KINDS = frozenset(RowKind)


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What a row takes from the budgets of a step."""

    tokens: int = 0
    rows: int = 0
    pages: int = 0
    logits_bytes: int = 0
    latent_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            tokens=self.tokens + other.tokens,
            rows=self.rows + other.rows,
            pages=self.pages + other.pages,
            logits_bytes=self.logits_bytes + other.logits_bytes,
            latent_bytes=self.latent_bytes + other.latent_bytes,
        )


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A span of one request in one forward.

    start, end: canvas positions that are fed, or denoise steps of an image. branch: "cond", or "uncond" under
    guidance; of a decoding, "final" or "preview".
    slot: first slot of the request's page table that takes their keys; None: the row sees itself alone.
    visible: how many slots all of its queries see, and the row's own behind them; None: as the model's
    attention says. border: so many of the first tokens are fed for their states alone; their keys are there.
    sample: which of a request's maskings a scoring row feeds.
    key: rows of one forward share it.
    """

    request_id: str
    kind: RowKind
    start: int
    end: int
    branch: str = "cond"
    slot: int | None = None
    visible: int | None = None
    border: int = 0
    sample: int = 0
    key: str = "text"
    cost: Cost = Cost()


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one forward; printing it explains the step.

    guesses: ids of requests whose rows depend on an outcome that is not known yet; they are made anew when
    the forward begins.
    is_idle_forward: there are no rows, and a forward is made because other ranks have some. by_graph: all
    ranks may replay a recorded forward; which one, their rows say when it begins.
    """

    launch_id: int
    rows: tuple[Row, ...] = ()
    guesses: frozenset[str] = frozenset()
    is_idle_forward: bool = False
    by_graph: bool = False

    @property
    def forward(self) -> bool:
        """Whether there is anything to run."""
        return bool(self.rows) or self.is_idle_forward

    @property
    def kind(self) -> str:
        """Return "prefill", "denoise" or "mixed", or an image stage; "idle" where there are no rows."""
        if not self.rows:
            return "idle"
        if self.rows[0].kind in (RowKind.ENCODE, RowKind.DECODE):
            return self.rows[0].kind.value
        prefill = any(row.kind is RowKind.PREFILL for row in self.rows)
        denoise = any(row.kind is not RowKind.PREFILL for row in self.rows)
        return "mixed" if prefill and denoise else "prefill" if prefill else "denoise"

    def request_ids(self) -> list[str]:
        """Return each request of the plan once, in row order."""
        return list(dict.fromkeys(row.request_id for row in self.rows))

    def by_request(self) -> dict[str, tuple[Row, ...]]:
        """Return each request's rows."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.request_id, []).append(row)
        return {request_id: tuple(rows) for request_id, rows in found.items()}


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What a denoise row decided, as numpy arrays over the window [start, start + W) of the canvas.

    tokens: i64[W], the best guess of each position. transfer: bool[W], positions that take their token now.
    renoised: i64[W], tokens that the undecided positions show from now on; None leaves them as they are.
    confidence: f32[W]. logprob: f32[W] and alternatives (ids i64[W, K], values f32[W, K]) if asked for.
    done: the algorithm ends the block here although positions may be undecided (None: when all are decided).
    state: the algorithm's state after this step.
    """

    start: int
    tokens: Any
    transfer: Any
    confidence: Any
    renoised: Any = None
    logprob: Any = None
    top_ids: Any = None
    top_logprobs: Any = None
    done: bool | None = None
    state: Any = None


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """What a scoring row read, as numpy arrays over its positions.

    logprob: f32[m] of the tokens that stand there; top_ids i64[m, K] and top_logprobs f32[m, K] if asked for.
    """

    logprob: Any
    top_ids: Any = None
    top_logprobs: Any = None


class RowResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one row; an error ends its request alone.

    outcome: what an image stage has made of the request's state; each of its rows has the same.
    """

    row: Row
    outcome: Any = None
    decision: Decision | None = None
    scores: Scores | None = None
    error: str | None = None


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """One per plan, in launch order; `device_seconds` is the time of the forward and its statistics.

    num_past: rows that turned out to have run on a block that was done.
    """

    launch_id: int
    rows: tuple[RowResult, ...]
    device_seconds: float = 0.0
    num_past: int = 0


def shares_of(result: StepResult, limit: int) -> tuple[StepShare, ...]:
    """Return what each of the first `limit` pairs of request and kind had in a step, in row order."""
    found: dict[tuple[str, RowKind], tuple[int, int]] = {}
    for row in (each.row for each in result.rows):
        key = (row.request_id, row.kind)
        if key not in found and len(found) == limit:
            continue
        rows, tokens = found.get(key, (0, 0))
        found[key] = (rows + 1, tokens + row.cost.tokens)
    return tuple(
        StepShare(request_id=request_id, kind=kind.value, rows=rows, tokens=tokens)
        for (request_id, kind), (rows, tokens) in found.items()
    )
