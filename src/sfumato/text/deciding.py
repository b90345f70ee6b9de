"""From statistics to decisions: the rows of each algorithm are stacked, decided together, and taken apart.

Letters: R rows of one algorithm, W window positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sfumato.core.plan import Decision
from sfumato.text.decoding.protocol import Algorithm, Outcome, Statistics, View
from sfumato.text.statistics import PackedStatistics
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
    width = max(window.stop - window.start for window in members)
    shape = (len(members), width)
    token_ids = np.zeros(shape, dtype=np.int64)
    undecided = np.zeros(shape, dtype=np.bool_)
    editable = np.zeros(shape, dtype=np.bool_)
    places = np.full(shape, -1, dtype=np.int64)
    uniform = (
        np.zeros(shape, dtype=np.float32) if any(w.work.algorithm.needs_uniform for w in members) else None
    )
    for index, window in enumerate(members):
        canvas, size = window.work.canvas, window.stop - window.start
        span = slice(window.start, window.stop)
        token_ids[index, :size] = canvas.token_ids[span]
        undecided[index, :size] = canvas.undecided[span]
        editable[index, :size] = ~canvas.undecided[span] & ~canvas.pinned[span]
        places[index, window.positions - window.start] = window.offset + np.arange(len(window.positions))
        if uniform is not None and window.work.algorithm.needs_uniform:
            uniform[index, :size] = canvas.random_source.uniform(
                canvas.block_index, canvas.step, np.arange(window.start, window.stop)
            )
    device = packed.token.device
    at = torch.from_numpy(places).to(device)
    was_read = at >= 0
    at = at.clamp(min=0)
    ids = torch.from_numpy(token_ids).to(device)
    statistics = Statistics(token=ids, confidence=torch.ones(shape, device=device))
    if packed.token.numel():
        # A reference may go on where nothing is left to read; then nothing was.
        statistics = Statistics(
            token=torch.where(was_read, packed.token[at], ids),
            confidence=packed.confidence[at].masked_fill(~was_read, 1.0),
        )
    canvases = [window.work.canvas for window in members]
    view = View(
        token_ids=ids,
        undecided=torch.from_numpy(undecided).to(device),
        editable=torch.from_numpy(editable).to(device),
        step=torch.tensor([canvas.step for canvas in canvases], device=device),
        masks_at_start=torch.tensor([canvas.masks_at_start for canvas in canvases], device=device),
        block_length=[canvas.block_length for canvas in canvases],
        num_blocks=[canvas.num_blocks for canvas in canvases],
        uniform=None if uniform is None else torch.from_numpy(uniform).to(device),
    )
    return view, statistics, places


def _unstack(
    members: list[Window],
    outcome: Outcome,
    statistics: Statistics,
    packed: PackedStatistics,
    places: NDArray[np.int64],
) -> dict[str, Decision]:
    tokens, transfer = outcome.tokens.cpu().numpy(), outcome.transfer.cpu().numpy()
    confidence = statistics.confidence.cpu().numpy()
    done = None if outcome.done is None else outcome.done.cpu().numpy()
    decisions = {}
    for index, window in enumerate(members):
        size = window.stop - window.start
        logs: dict[str, Any] = {}
        if (
            window.work.spec.logprobs is not None
            and packed.top_ids is not None
            and packed.top_logprobs is not None
        ):
            at = torch.from_numpy(np.maximum(places[index, :size], 0)).to(packed.token.device)
            logs = {
                "logprob": packed.logprob[at].cpu().numpy(),
                "top_ids": packed.top_ids[at].cpu().numpy(),
                "top_logprobs": packed.top_logprobs[at].cpu().numpy(),
            }
        decisions[window.request_id] = Decision(
            start=window.start,
            tokens=tokens[index, :size],
            transfer=transfer[index, :size],
            confidence=confidence[index, :size],
            done=None if done is None else bool(done[index]),
            state=None if outcome.states is None else outcome.states[index],
            **logs,
        )
    return decisions
