"""What each row of a plan needs back from the forward, and how the logits of its open positions are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from sfumato.core.plan import Row, RowKind, StepPlan
from sfumato.core.spec import Sampling
from sfumato.text.statistics import Reading
from sfumato.text.walk import Round
from sfumato.text.work import TextWork


@dataclass(frozen=True, slots=True)
class Window:
    """The step of one denoise row and the positions that it reads.

    offset: where its readings start among the packed ones.
    """

    request_id: str
    work: TextWork
    step: Round
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

    A denoise row reads its open positions; where logits are shifted, the states one position to the left,
    but the first that is fed has only its own. Of a row that only keeps keys and values, the last token tells
    whether they are finite: it has seen all of them.
    """
    outputs: list[Output] = []
    windows: dict[str, Window] = {}
    start = hidden_start = num_read = 0
    for row in plan.rows:
        window, work = None, works[row.request_id]
        positions: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        if is_decided_by(row.kind, row.branch) and work.round is not None:
            positions = work.read_positions(work.round)
            window = Window(row.request_id, work, work.round, positions, num_read)
            windows[row.request_id] = window
            num_read += len(positions)
        if row.kind is RowKind.DENOISE:
            positions = windows[row.request_id].positions
        if work.traits.shifts_logits:
            positions = np.maximum(positions - 1, row.start)
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
                sampling=_sampling(window),
                transform=work.transform,
                random_source=work.canvas.random_source,
                block=work.canvas.block_index,
                step=work.canvas.step,
                wanted=work.algorithm.wanted,
                excluded_ids=work.excluded_ids,
                num_alternatives=work.spec.logprobs,
                guided_rows=None if other is None else other.hidden_start + places,
                previous_ids=_previous_ids(window),
                asked_ids=_asked_ids(window),
                own_ids=work.canvas.token_ids[window.positions] if window.step.own_penalty else None,
                own_penalty=window.step.own_penalty,
                even_share=window.step.even_share,
            )
        )
    return readings


def _sampling(window: Window) -> Sampling:
    sampling = window.work.spec.sampling
    if window.step.temperature is None:
        return sampling
    return msgspec.structs.replace(sampling, temperature=window.step.temperature)


def _previous_ids(window: Window) -> NDArray[np.int64] | None:
    """Return the token to the left of each position, -1 for the window's first, where it is penalised."""
    if not window.work.transform.repeat_penalty:
        return None
    previous = window.work.canvas.token_ids[np.maximum(window.positions - 1, 0)]
    return np.where(window.positions > window.step.start, previous, -1)


def _asked_ids(window: Window) -> NDArray[np.int64] | None:
    """Return the tokens that the algorithm asks about, for the positions that are read."""
    step, work = window.step, window.work
    asked = work.algorithm.asked_ids(
        work.canvas.token_ids[step.start : step.stop], work.canvas.algorithm_state
    )
    return None if asked is None else asked[window.positions - step.start]


def is_decided_by(kind: RowKind, branch: str) -> bool:
    """Whether a row of this kind and branch brings its request's decision."""
    return kind is RowKind.DENOISE and branch == "cond"
