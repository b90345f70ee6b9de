"""From statistics to decisions: the rows of each algorithm are stacked, decided together, and taken apart.

Letters: R rows of one algorithm, W window positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.plan import Decision
from sfumato.models.placing import placed
from sfumato.text.advanced import Advanced
from sfumato.text.decoding.protocol import Algorithm, Outcome, Statistics, View, per_row
from sfumato.text.host_copies import HostCopies
from sfumato.text.statistics import PackedStatistics, nothing_read
from sfumato.text.windows import Window


@dataclass(frozen=True, slots=True, eq=False)
class Decided:
    """What one algorithm has decided for R windows, on the device.

    undecided: bool[R, W] before the step. confidence: f32[R, W]. places: i64[R, W] packed index of each
    position, -1 if not read.
    """

    members: Sequence[Window]
    view: View
    outcome: Outcome
    undecided: Tensor
    confidence: Tensor
    places: NDArray[np.int64]

    def on_host(self, copies: HostCopies) -> Decided:
        """Return it with what the host reads of it there; algorithm states stay where they are."""
        outcome = replace(
            self.outcome,
            transfer=copies.take(self.outcome.transfer),
            tokens=copies.take(self.outcome.tokens),
            renoised=copies.take_if(self.outcome.renoised),
            done=copies.take_if(self.outcome.done),
        )
        return replace(self, outcome=outcome, confidence=copies.take(self.confidence))

    def advanced(self) -> Advanced:
        """Return the windows behind the step, as `TextWork` will write them."""
        outcome, shown = self.outcome, self.view.token_ids
        transfer = outcome.transfer & (self.undecided | self.view.editable)
        if outcome.renoised is not None:
            shown = torch.where(self.undecided & ~outcome.transfer, outcome.renoised, shown)
        mask_ids = per_row(self.view.mask_token_id, self.view)[:, None]
        return Advanced(
            token_ids=torch.where(transfer, outcome.tokens, shown),
            undecided=torch.where(transfer, outcome.tokens == mask_ids, self.undecided),
            states=outcome.states,
        )


def decide(windows: list[Window], packed: PackedStatistics) -> list[Decided]:
    """Let each algorithm decide for its rows together."""
    groups: dict[type[Algorithm], list[Window]] = {}
    for window in windows:
        groups.setdefault(type(window.work.algorithm), []).append(window)
    return [_decide(algorithm, members, packed) for algorithm, members in groups.items()]


def _decide(algorithm: type[Algorithm], members: list[Window], packed: PackedStatistics) -> Decided:
    stack = _stack(members)
    device = packed.token.device
    ids, eligible, editable, undecided, focus, is_given = (
        placed(array, device)
        for array in (
            stack.token_ids,
            stack.eligible,
            stack.editable,
            stack.undecided,
            stack.focus,
            stack.is_given,
        )
    )
    _take_advanced(members, ids, eligible, editable, undecided)
    view = View(
        token_ids=ids,
        eligible=eligible,
        editable=editable,
        focus=focus,
        is_given=is_given,
        **_row_values(members, ids.shape, device),
    )
    statistics = _statistics(members, packed, ids, placed(stack.places, device))
    outcome = algorithm.decide(
        [window.work.algorithm for window in members], view, statistics, _states(members)
    )
    return Decided(members, view, outcome, undecided, statistics.confidence, stack.places)


@dataclass(frozen=True, slots=True, eq=False)
class _Stack:
    """Windows as the host knows them, padded: [R, W] each."""

    token_ids: NDArray[np.int64]
    eligible: NDArray[np.bool_]
    editable: NDArray[np.bool_]
    undecided: NDArray[np.bool_]
    focus: NDArray[np.bool_]
    is_given: NDArray[np.bool_]
    places: NDArray[np.int64]


def _stack(members: list[Window]) -> _Stack:
    shape = (len(members), max(window.step.stop - window.step.start for window in members))
    eligible, editable, undecided, focus, is_given = (np.zeros(shape, dtype=np.bool_) for _ in range(5))
    token_ids, places = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    stack = _Stack(token_ids, eligible, editable, undecided, focus, is_given, places)
    for index, window in enumerate(members):
        canvas, step = window.work.canvas, window.step
        size, span = step.stop - step.start, slice(step.start, step.stop)
        stack.token_ids[index, :size] = canvas.token_ids[span]
        stack.eligible[index, :size] = step.eligible
        stack.editable[index, :size] = ~canvas.undecided[span] & ~canvas.pinned[span]
        stack.undecided[index, :size] = canvas.undecided[span]
        stack.is_given[index, :size] = canvas.given[span]
        stack.focus[index, max(0, step.focus[0] - step.start) : max(0, step.focus[1] - step.start)] = True
        stack.places[index, window.positions - step.start] = window.offset + np.arange(len(window.positions))
    return stack


def _take_advanced(
    members: list[Window], ids: Tensor, eligible: Tensor, editable: Tensor, undecided: Tensor
) -> None:
    """Put windows in place that are further than the host knows; [R, W] each."""
    groups: dict[int, list[int]] = {}
    for index, window in enumerate(members):
        if window.ahead is not None:
            groups.setdefault(id(window.ahead.windows), []).append(index)
    for places in groups.values():
        ahead = [row for row in (members[place].ahead for place in places) if row is not None]
        windows = ahead[0].windows
        to, rows = (placed(each, ids.device) for each in (places, [row.row for row in ahead]))
        width = min(ids.shape[1], windows.token_ids.shape[1])
        is_free, is_open = undecided[to, :width] | editable[to, :width], windows.undecided[rows, :width]
        ids[to, :width] = windows.token_ids[rows, :width]
        undecided[to, :width] = eligible[to, :width] = is_open
        editable[to, :width] = is_free & ~is_open


def _states(members: list[Window]) -> list[Any]:
    return [
        window.work.canvas.algorithm_state if window.ahead is None else window.ahead.state
        for window in members
    ]


def _row_values(members: list[Window], shape: torch.Size, device: torch.device) -> dict[str, Any]:
    """Return what a view says of each row, and the numbers that were drawn for it."""
    canvases = [window.work.canvas for window in members]
    needs_vocabulary = any(window.work.algorithm.needs_vocabulary for window in members)
    drawn = _vocabulary(members, shape) if needs_vocabulary else None
    return {
        "step": placed([window.step_index for window in members], device),
        "masks_at_start": placed([canvas.masks_at_start for canvas in canvases], device),
        "block_length": [canvas.block_length for canvas in canvases],
        "num_blocks": [canvas.num_blocks for canvas in canvases],
        "vocab_size": members[0].work.traits.vocab_size,
        "mask_token_id": [window.work.traits.mask_token_id for window in members],
        "uniform": _uniform(members, shape, device),
        "vocabulary": None if drawn is None else placed(drawn[0], device),
        "routes": None if drawn is None else placed(drawn[1], device),
    }


def _statistics(members: list[Window], packed: PackedStatistics, ids: Tensor, at: Tensor) -> Statistics:
    """Lay packed statistics out as [R, W]; positions that were not read show their token, surely."""
    if not packed.token.numel():
        # A reference may go on where nothing is left to read; then nothing was.
        packed = nothing_read(packed.token.device)
    was_read = at >= 0
    at = at.clamp(min=0)
    wanted = [window.work.algorithm.wanted for window in members]
    soft = packed.soft_embedding
    asked = packed.asked_logprobs
    has_top = any(row.top for row in wanted) and packed.top_ids is not None
    return Statistics(
        token=torch.where(was_read, packed.token[at], ids),
        confidence=packed.confidence[at].masked_fill(~was_read, 1.0),
        best=torch.where(was_read, packed.best[at], ids) if any(row.best for row in wanted) else None,
        entropy=packed.entropy[at] if any(row.entropy for row in wanted) else None,
        margin=packed.margin[at] if any(row.margin for row in wanted) else None,
        top_ids=packed.top_ids[at] if has_top and packed.top_ids is not None else None,
        top_probabilities=(
            packed.top_logprobs[at].exp() if has_top and packed.top_logprobs is not None else None
        ),
        asked_logprobs=None if asked is None else asked[at],
        soft_embedding=(
            # Where nothing was read nothing is expected; what stands there is a neighbour's.
            soft[at].masked_fill(~was_read[..., None], 0.0)
            if soft is not None and any(row.soft_embedding for row in wanted)
            else None
        ),
    )


def _uniform(members: list[Window], shape: torch.Size, device: torch.device) -> Tensor | None:
    if not any(window.work.algorithm.needs_uniform for window in members):
        return None
    drawn = np.zeros(shape, dtype=np.float32)
    for index, window in enumerate(members):
        canvas, step = window.work.canvas, window.step
        if window.work.algorithm.needs_uniform:
            drawn[index, : step.stop - step.start] = canvas.random_source.uniform(
                canvas.block_index, window.step_index, np.arange(step.start, step.stop)
            )
    return placed(drawn, device)


def _vocabulary(members: list[Window], shape: torch.Size) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return random tokens and recorded routes, i64[R, W] each."""
    drawn, routes = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    for index, window in enumerate(members):
        canvas, step = window.work.canvas, window.step
        if not window.work.algorithm.needs_vocabulary:
            continue
        place = (canvas.block_index, window.step_index, np.arange(step.start, step.stop))
        size, source = step.stop - step.start, canvas.random_source
        drawn[index, :size] = source.vocabulary(*place, window.work.traits.vocab_size)
        recorded = source.routes(*place)
        if recorded is not None:
            routes[index, :size] = recorded
    return drawn, routes


def read_decisions(decided: Decided, packed: PackedStatistics) -> dict[str, Decision]:
    """Take the decisions of a group apart, on the host; each canvas is as it was before the step."""
    outcome = decided.outcome
    tokens, transfer = outcome.tokens.numpy(), outcome.transfer.numpy()
    renoised = None if outcome.renoised is None else outcome.renoised.numpy()
    confidence = decided.confidence.numpy()
    done = None if outcome.done is None else outcome.done.numpy()
    decisions = {}
    for index, window in enumerate(decided.members):
        size = window.step.stop - window.step.start
        logs: dict[str, Any] = {}
        if window.work.spec.logprobs is not None and packed.top_ids is not None:
            logs = _logprobs(window, packed, decided.places[index, :size], tokens[index, :size])
        decisions[window.request_id] = Decision(
            start=window.step.start,
            tokens=tokens[index, :size],
            transfer=transfer[index, :size],
            confidence=confidence[index, :size],
            renoised=None if renoised is None else renoised[index, :size],
            done=None if done is None else bool(done[index]),
            state=None if outcome.states is None else outcome.states[index],
            **logs,
        )
    return decisions


def _logprobs(
    window: Window, packed: PackedStatistics, places: NDArray[np.int64], tokens: NDArray[np.int64]
) -> dict[str, Any]:
    """Return the alternatives of each position and the log probability of its decided token.

    That token is the one that was read, unless the algorithm took another: the best one, an alternative, or
    one that it had asked about.
    """
    assert packed.top_ids is not None
    assert packed.top_logprobs is not None
    at = np.maximum(places, 0)
    read, logprob = packed.token.numpy()[at], packed.logprob.numpy()[at]
    ids, values = packed.top_ids.numpy()[at], packed.top_logprobs.numpy()[at]
    found = {"logprob": logprob, "top_ids": ids, "top_logprobs": values}
    other = np.flatnonzero(tokens != read)
    if not other.size:
        return found
    step, work = window.step, window.work
    asked = work.algorithm.asked_ids(
        work.canvas.token_ids[step.start : step.stop], work.canvas.algorithm_state
    )
    if asked is not None and packed.asked_logprobs is not None:
        named = packed.asked_logprobs.numpy()[at][:, : asked.shape[1]]
        ids, values = np.concatenate([ids, asked], axis=1), np.concatenate([values, named], axis=1)
    matches = ids[other] == tokens[other, None]
    known = matches.any(-1)
    logprob[other[known]] = values[other[known], matches[known].argmax(-1)]
    return found
