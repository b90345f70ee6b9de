"""What each row of a plan needs back from the forward, and how the logits of its positions are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.plan import Row, RowKind, Scores, StepPlan
from sfumato.core.spec import Sampling
from sfumato.core.traits import ModelTraits
from sfumato.text.advanced import AdvancedRow
from sfumato.text.batching import FedRow
from sfumato.text.decoding.protocol import Transform
from sfumato.text.random_source import CounterSource
from sfumato.text.scoring import ScoringWork
from sfumato.text.statistics import PackedStatistics
from sfumato.text.transform import Frontier, Reading
from sfumato.text.walk import Round
from sfumato.text.work import TextWork


class Readable(Protocol):
    """The part of a request's work that the runner uses of every row."""

    traits: ModelTraits

    def fed(self, row: Row, pages: Sequence[int] | None) -> FedRow: ...


@dataclass(frozen=True, slots=True)
class Window:
    """The step of one denoise row and the positions that it reads.

    offset: where its readings start among the packed ones. ahead: the window behind the step that runs before
    this one, where the host does not know its outcome.
    """

    request_id: str
    work: TextWork
    step: Round
    positions: NDArray[np.int64]
    offset: int
    ahead: AdvancedRow | None = None

    @property
    def step_index(self) -> int:
        """Return how many steps its block has taken before this one."""
        return self.work.canvas.step + (self.ahead is not None)

    @property
    def is_past(self) -> bool:
        """Whether its block was done before this step, as the host knows by now."""
        step = self.work.round
        return step is None or step.start != self.step.start


@dataclass(frozen=True, slots=True)
class Output:
    """What a row needs back: tokens i64[P], packed; their states start at hidden_start.

    num_read: positions whose logits are read, from `offset` on among all that are.
    """

    row: Row
    work: Readable
    tokens: NDArray[np.int64]
    hidden_start: int
    offset: int
    num_read: int
    positions: NDArray[np.int64]
    window: Window | None


def row_outputs(
    plan: StepPlan, works: Mapping[str, Readable], ahead: Mapping[str, AdvancedRow]
) -> list[Output]:
    """Return for each row the packed tokens whose hidden states are needed; ahead: by request id.

    A denoise or scoring row reads its open positions; where logits are shifted, the states one position to
    the left, but the first that is fed has only its own. Of a row that only keeps keys and values, the last
    token tells whether they are finite: it has seen all of them.
    """
    outputs: list[Output] = []
    start = hidden_start = offset = 0
    for row in plan.rows:
        window, work = None, works[row.request_id]
        positions: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        if row.kind is RowKind.SCORE:
            positions = cast(ScoringWork, work).scored(row)
        elif row.kind is RowKind.DENOISE:
            text_work = cast(TextWork, work)
            advanced = ahead.get(row.request_id)
            step = text_work.round if advanced is None else text_work.again()
            assert step is not None
            positions = text_work.read_positions(step)
            if row.branch == "cond":
                window = Window(row.request_id, text_work, step, positions, offset, advanced)
        at = np.maximum(positions - 1, row.start) if work.traits.shifts_logits else positions
        tokens = start + (at if at.size else np.asarray([row.end - 1])) - row.start
        num_read = len(positions) if row.branch == "cond" else 0
        outputs.append(Output(row, work, tokens, hidden_start, offset, num_read, positions, window))
        start += row.end - row.start
        hidden_start += len(tokens)
        offset += num_read
    return outputs


def show_advanced(token_ids: Tensor, outputs: Sequence[Output]) -> None:
    """Put the tokens of windows that are further than the host knows into a batch's, i64[N]. In place."""
    start = 0
    for output in outputs:
        window = output.window
        if window is not None and window.ahead is not None:
            at, size = start + window.step.start - output.row.start, window.step.stop - window.step.start
            token_ids[at : at + size] = window.ahead.token_ids[:size]
        start += output.row.end - output.row.start


def readings_of(outputs: Sequence[Output]) -> list[Reading]:
    """Return how each row's logits are read; an unconditional branch is read with its condition."""
    guided = {_pair(output.row): output for output in outputs if output.row.branch == "uncond"}
    readings: list[Reading] = []
    for output in outputs:
        if not output.num_read and output.window is None:
            continue
        other = guided.get(_pair(output.row))
        places = np.arange(output.num_read)
        rows = output.hidden_start + places
        guided_rows = None if other is None else other.hidden_start + places
        if output.window is not None:
            readings.append(_step_reading(output.window, rows, guided_rows))
        else:
            readings.append(_score_reading(output, rows, guided_rows))
    return readings


def _pair(row: Row) -> tuple[str, int]:
    return row.request_id, row.sample


def _step_reading(window: Window, rows: NDArray[np.int64], guided_rows: NDArray[np.int64] | None) -> Reading:
    work, step = window.work, window.step
    return Reading(
        positions=window.positions,
        hidden_rows=rows,
        sampling=_sampling(window),
        transform=work.transform,
        random_source=work.canvas.random_source,
        block=work.canvas.block_index,
        step=window.step_index,
        wanted=work.algorithm.wanted_at(window.step_index),
        excluded_ids=work.excluded_ids,
        num_alternatives=work.spec.logprobs,
        guided_rows=guided_rows,
        previous_ids=_previous_ids(window),
        asked_ids=_asked_ids(window),
        own_ids=work.canvas.token_ids[window.positions] if step.own_penalty else None,
        own_penalty=step.own_penalty,
        even_share=step.even_share,
        frontier=_frontier(window),
    )


def _frontier(window: Window) -> Frontier | None:
    """Return what a grammar allows where its automaton stands."""
    constraint = window.work.constraint
    if constraint is None:
        return None
    position = constraint.follow(window.work.canvas)
    return Frontier(position, constraint.allowed())


def _score_reading(output: Output, rows: NDArray[np.int64], guided_rows: NDArray[np.int64] | None) -> Reading:
    work = cast(ScoringWork, output.work)
    return Reading(
        positions=output.positions,
        hidden_rows=rows,
        sampling=Sampling(),
        transform=Transform(guidance_scale=work.spec.cfg_scale),
        random_source=CounterSource(work.spec.seed),
        block=0,
        step=0,
        excluded_ids=work.excluded_ids,
        num_alternatives=work.spec.logprobs,
        guided_rows=guided_rows,
        asked_ids=work.token_ids[output.positions][:, None],
    )


def read_scores(outputs: Sequence[Output], packed: PackedStatistics) -> dict[int, Scores]:
    """Return for each scoring row of a plan, by its index, what was read of its tokens (on the host)."""
    scores = {}
    for index, output in enumerate(outputs):
        if output.row.kind is not RowKind.SCORE or not output.num_read:
            continue
        assert packed.asked_logprobs is not None
        span = slice(output.offset, output.offset + output.num_read)
        scores[index] = Scores(
            logprob=packed.asked_logprobs[span, 0].numpy(),
            top_ids=None if packed.top_ids is None else packed.top_ids[span].numpy(),
            top_logprobs=None if packed.top_logprobs is None else packed.top_logprobs[span].numpy(),
        )
    return scores


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
