"""What each row of a plan needs back from the forward, and how the logits of its open positions are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sfumato.core.plan import Row, RowKind, StepPlan
from sfumato.text.statistics import Reading
from sfumato.text.work import TextWork


@dataclass(frozen=True, slots=True)
class Window:
    """The open positions of one denoise row; offset: where its readings start among the packed ones."""

    request_id: str
    work: TextWork
    start: int
    stop: int
    positions: NDArray[np.int64]
    offset: int


@dataclass(frozen=True, slots=True)
class Output:
    """What a row needs back: tokens i64[P], packed; their states start at hidden_start."""

    row: Row
    tokens: NDArray[np.int64]
    hidden_start: int
    window: Window | None


def row_outputs(plan: StepPlan, works: Mapping[str, TextWork]) -> list[Output]:
    """Return for each row the packed tokens whose hidden states are needed.

    A denoise row reads its open positions. Of a row that only keeps keys and values, the last token tells
    whether they are finite: it has seen all of them.
    """
    outputs: list[Output] = []
    windows: dict[str, Window] = {}
    start = hidden_start = num_read = 0
    for row in plan.rows:
        window = None
        positions: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        if is_decided_by(row.kind, row.branch):
            window = _window(row.request_id, works[row.request_id], row.start, num_read)
            windows[row.request_id] = window
            num_read += len(window.positions)
        if row.kind is RowKind.DENOISE:
            positions = windows[row.request_id].positions
        tokens = start + (positions if positions.size else np.asarray([row.end - 1])) - row.start
        outputs.append(Output(row, tokens, hidden_start, window))
        start += row.end - row.start
        hidden_start += len(tokens)
    return outputs


def readings_of(outputs: Sequence[Output]) -> list[Reading]:
    """Return how each open window's logits are read; an unconditional branch is read with its window."""
    guided = {output.row.request_id: output for output in outputs if output.row.branch == "uncond"}
    readings: list[Reading] = []
    for output in outputs:
        window = output.window
        if window is None:
            continue
        work, places = window.work, np.arange(len(window.positions))
        other = guided.get(window.request_id)
        readings.append(
            Reading(
                positions=window.positions,
                hidden_rows=output.hidden_start + places,
                sampling=work.spec.sampling,
                transform=work.transform,
                random_source=work.canvas.random_source,
                block=work.canvas.block_index,
                step=work.canvas.step,
                excluded_ids=work.excluded_ids,
                num_alternatives=work.spec.logprobs,
                guided_rows=None if other is None else other.hidden_start + places,
            )
        )
    return readings


def is_decided_by(kind: RowKind, branch: str) -> bool:
    return kind is RowKind.DENOISE and branch == "cond"


def _window(request_id: str, work: TextWork, first_fed: int, offset: int) -> Window:
    """Return the open block, from the first undecided position on if one was left in front of it."""
    canvas = work.canvas
    start, stop = canvas.block_start, canvas.block_end
    left = canvas.undecided[first_fed:start]
    if left.any():
        start = first_fed + int(left.argmax())
    read = canvas.undecided[start:stop]
    if work.algorithm.reads_decided:
        read = ~canvas.pinned[start:stop]
    return Window(request_id, work, start, stop, start + np.flatnonzero(read), offset)
