"""From statistics to decisions: the rows of each algorithm are stacked, decided together, and taken apart.

Letters: R rows of one algorithm, W window positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.plan import Decision
from sfumato.text.decoding.protocol import Algorithm, Outcome, Statistics, View
from sfumato.text.statistics import PackedStatistics, nothing_read
from sfumato.text.windows import Window


def decide(windows: list[Window], packed: PackedStatistics) -> dict[str, Decision]:
    """Let each algorithm decide for its rows together."""
    groups: dict[type[Algorithm], list[Window]] = {}
    for window in windows:
        groups.setdefault(type(window.work.algorithm), []).append(window)
    decisions: dict[str, Decision] = {}
    for algorithm, members in groups.items():
        view, statistics, places = _stack(members, packed)
        rows = [window.work.algorithm for window in members]
        states = [window.work.canvas.algorithm_state for window in members]
        outcome = algorithm.decide(rows, view, statistics, states)
        decisions |= _unstack(members, outcome, statistics, packed, places)
    return decisions


def _stack(members: list[Window], packed: PackedStatistics) -> tuple[View, Statistics, NDArray[np.int64]]:
    """Stack windows into [R, W]; places: i64[R, W] packed index of each position, -1 if not read."""
    width = max(window.step.stop - window.step.start for window in members)
    shape = (len(members), width)
    token_ids = np.zeros(shape, dtype=np.int64)
    eligible, editable, focus, is_given = (np.zeros(shape, dtype=np.bool_) for _ in range(4))
    places = np.full(shape, -1, dtype=np.int64)
    for index, window in enumerate(members):
        canvas, step = window.work.canvas, window.step
        size, span = step.stop - step.start, slice(step.start, step.stop)
        token_ids[index, :size] = canvas.token_ids[span]
        eligible[index, :size] = step.eligible
        editable[index, :size] = ~canvas.undecided[span] & ~canvas.pinned[span]
        is_given[index, :size] = canvas.given[span]
        focus[index, max(0, step.focus[0] - step.start) : max(0, step.focus[1] - step.start)] = True
        places[index, window.positions - step.start] = window.offset + np.arange(len(window.positions))
    device = packed.token.device
    ids = torch.from_numpy(token_ids).to(device)
    canvases = [window.work.canvas for window in members]
    needs_vocabulary = any(window.work.algorithm.needs_vocabulary for window in members)
    drawn = _vocabulary(members, shape) if needs_vocabulary else None
    view = View(
        token_ids=ids,
        eligible=torch.from_numpy(eligible).to(device),
        editable=torch.from_numpy(editable).to(device),
        focus=torch.from_numpy(focus).to(device),
        is_given=torch.from_numpy(is_given).to(device),
        step=torch.tensor([canvas.step for canvas in canvases], device=device),
        masks_at_start=torch.tensor([canvas.masks_at_start for canvas in canvases], device=device),
        block_length=[canvas.block_length for canvas in canvases],
        num_blocks=[canvas.num_blocks for canvas in canvases],
        vocab_size=members[0].work.traits.vocab_size,
        mask_token_id=[window.work.traits.mask_token_id for window in members],
        uniform=_uniform(members, shape, device),
        vocabulary=None if drawn is None else torch.from_numpy(drawn[0]).to(device),
        routes=None if drawn is None else torch.from_numpy(drawn[1]).to(device),
    )
    return view, _statistics(members, packed, ids, torch.from_numpy(places).to(device)), places


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
        soft_embedding=(soft[at] if soft is not None and any(row.soft_embedding for row in wanted) else None),
    )


def _uniform(members: list[Window], shape: tuple[int, int], device: torch.device) -> Tensor | None:
    if not any(window.work.algorithm.needs_uniform for window in members):
        return None
    drawn = np.zeros(shape, dtype=np.float32)
    for index, window in enumerate(members):
        canvas, step = window.work.canvas, window.step
        if window.work.algorithm.needs_uniform:
            drawn[index, : step.stop - step.start] = canvas.random_source.uniform(
                canvas.block_index, canvas.step, np.arange(step.start, step.stop)
            )
    return torch.from_numpy(drawn).to(device)


def _vocabulary(members: list[Window], shape: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return random tokens and recorded routes, i64[R, W] each."""
    drawn, routes = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    for index, window in enumerate(members):
        canvas, step = window.work.canvas, window.step
        if not window.work.algorithm.needs_vocabulary:
            continue
        place = (canvas.block_index, canvas.step, np.arange(step.start, step.stop))
        size, source = step.stop - step.start, canvas.random_source
        drawn[index, :size] = source.vocabulary(*place, window.work.traits.vocab_size)
        recorded = source.routes(*place)
        if recorded is not None:
            routes[index, :size] = recorded
    return drawn, routes


def _unstack(
    members: list[Window],
    outcome: Outcome,
    statistics: Statistics,
    packed: PackedStatistics,
    places: NDArray[np.int64],
) -> dict[str, Decision]:
    tokens, transfer = outcome.tokens.cpu().numpy(), outcome.transfer.cpu().numpy()
    renoised = None if outcome.renoised is None else outcome.renoised.cpu().numpy()
    confidence = statistics.confidence.cpu().numpy()
    done = None if outcome.done is None else outcome.done.cpu().numpy()
    decisions = {}
    for index, window in enumerate(members):
        size = window.step.stop - window.step.start
        logs: dict[str, Any] = {}
        if (
            window.work.spec.logprobs is not None
            and packed.top_ids is not None
            and packed.top_logprobs is not None
        ):
            logs = _logprobs(window, packed, places[index, :size], tokens[index, :size])
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
    at = torch.from_numpy(np.maximum(places, 0)).to(packed.token.device)
    read = packed.token[at].cpu().numpy()
    logprob = packed.logprob[at].cpu().numpy()
    ids, values = packed.top_ids[at].cpu().numpy(), packed.top_logprobs[at].cpu().numpy()
    found = {"logprob": logprob, "top_ids": ids, "top_logprobs": values}
    other = np.flatnonzero(tokens != read)
    if not other.size:
        return found
    step, work = window.step, window.work
    asked = work.algorithm.asked_ids(
        work.canvas.token_ids[step.start : step.stop], work.canvas.algorithm_state
    )
    if asked is not None and packed.asked_logprobs is not None:
        named = packed.asked_logprobs[at].cpu().numpy()[:, : asked.shape[1]]
        ids, values = np.concatenate([ids, asked], axis=1), np.concatenate([values, named], axis=1)
    matches = ids[other] == tokens[other, None]
    known = matches.any(-1)
    logprob[other[known]] = values[other[known], matches[known].argmax(-1)]
    return found
