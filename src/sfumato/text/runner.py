"""Runs the rows of a plan: one forward, one pass of statistics, one call per decoding algorithm.

Letters: R rows of one algorithm, W window positions, M packed positions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.plan import Decision, Row, RowKind, RowResult, StepPlan, StepResult
from sfumato.core.request import Request
from sfumato.core.traits import ModelTraits
from sfumato.errors import EngineError
from sfumato.models.batch import Batch, KVStore
from sfumato.text.batching import FedRow, make_batch
from sfumato.text.decoding.protocol import Algorithm, Outcome, Statistics, View
from sfumato.text.statistics import PackedStatistics, Reading, compute_statistics
from sfumato.text.work import TextWork


class TextModel(Protocol):
    """The part of a model that a step uses."""

    @property
    def device(self) -> torch.device: ...

    def hidden(self, batch: Batch) -> Tensor: ...

    def head(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Window:
    """The open positions of one denoise row; offset: where its readings start among the packed ones."""

    request_id: str
    work: TextWork
    start: int
    stop: int
    positions: NDArray[np.int64]
    offset: int


@dataclass(frozen=True, slots=True)
class _Output:
    """What a row needs back: tokens i64[P], packed; their states start at hidden_start."""

    row: Row
    tokens: NDArray[np.int64]
    hidden_start: int
    window: _Window | None


class TextRunner:
    """Launches plans of text rows on one model.

    chunk_bytes bounds the float32 logits that exist at one time.
    """

    def __init__(
        self,
        model: TextModel,
        traits: ModelTraits,
        *,
        store: KVStore | None,
        page_size: int,
        chunk_bytes: int,
    ) -> None:
        self._model = model
        self._traits = traits
        self._store = store
        self._page_size = page_size
        self._chunk_bytes = chunk_bytes

    @torch.inference_mode()
    def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult:
        """Run a plan. A request whose rows raise, or whose logits are not finite, fails alone."""
        started = time.perf_counter()
        try:
            rows = self._run(plan, live)
        except (EngineError, KeyboardInterrupt):
            raise
        except Exception as error:
            rows = self._run_apart(plan, live, error)
        return StepResult(
            launch_id=plan.launch_id, rows=tuple(rows), device_seconds=time.perf_counter() - started
        )

    def _run_apart(self, plan: StepPlan, live: Mapping[str, Request], error: Exception) -> list[RowResult]:
        """Run each request's rows alone after a joint forward has raised, to find the one at fault."""
        ids = plan.request_ids()
        if len(ids) == 1:
            message = f"{type(error).__name__}: {error}"
            return [RowResult(row=row, error=message) for row in plan.rows]
        results: list[RowResult] = []
        for request_id in ids:
            rows = tuple(row for row in plan.rows if row.request_id == request_id)
            results.extend(self.launch(StepPlan(launch_id=plan.launch_id, rows=rows), live).rows)
        return results

    def _run(self, plan: StepPlan, live: Mapping[str, Request]) -> list[RowResult]:
        # A text lane only ever holds text work.
        works = {row.request_id: cast(TextWork, live[row.request_id].work) for row in plan.rows}
        fed = []
        for row in plan.rows:
            lease = live[row.request_id].lease
            pages = lease.pages if lease is not None and self._traits.has_exact_cache else None
            fed.append(FedRow(row=row, canvas=works[row.request_id].canvas, pages=pages))
        outputs = _outputs(plan, works)
        batch = make_batch(
            fed,
            output_tokens=np.concatenate([output.tokens for output in outputs]),
            store=self._store,
            page_size=self._page_size,
            mask_token_id=self._traits.mask_token_id,
            device=self._model.device,
        )
        hidden = self._model.hidden(batch)
        failures = _not_finite_hidden(outputs, hidden)
        windows = [output.window for output in outputs if output.window is not None]
        decisions: dict[str, Decision] = {}
        if windows:
            packed = compute_statistics(
                hidden,
                self._model.head,
                _readings(outputs),
                vocab_size=self._traits.vocab_size,
                chunk_bytes=self._chunk_bytes,
            )
            failures |= _not_finite(windows, packed)
            decisions = _decide(windows, packed)
        results = []
        for row in plan.rows:
            decision = decisions.get(row.request_id) if _is_decided_by(row.kind, row.branch) else None
            results.append(RowResult(row=row, decision=decision, error=failures.get(row.request_id)))
        return results


def _outputs(plan: StepPlan, works: Mapping[str, TextWork]) -> list[_Output]:
    """Return for each row the packed tokens whose hidden states are needed.

    A denoise row reads its open positions. Of a row that only keeps keys and values, the last token tells
    whether they are finite: it has seen all of them.
    """
    outputs: list[_Output] = []
    windows: dict[str, _Window] = {}
    start = hidden_start = num_read = 0
    for row in plan.rows:
        window = None
        positions: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        if _is_decided_by(row.kind, row.branch):
            window = _window(row.request_id, works[row.request_id], row.start, num_read)
            windows[row.request_id] = window
            num_read += len(window.positions)
        if row.kind is RowKind.DENOISE:
            positions = windows[row.request_id].positions
        tokens = start + (positions if positions.size else np.asarray([row.end - 1])) - row.start
        outputs.append(_Output(row, tokens, hidden_start, window))
        start += row.end - row.start
        hidden_start += len(tokens)
    return outputs


def _readings(outputs: Sequence[_Output]) -> list[Reading]:
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


def _is_decided_by(kind: RowKind, branch: str) -> bool:
    return kind is RowKind.DENOISE and branch == "cond"


def _window(request_id: str, work: TextWork, first_fed: int, offset: int) -> _Window:
    """Return the open block, from the first undecided position on if one was left in front of it."""
    canvas = work.canvas
    start, stop = canvas.block_start, canvas.block_end
    left = canvas.undecided[first_fed:start]
    if left.any():
        start = first_fed + int(left.argmax())
    read = canvas.undecided[start:stop]
    if work.algorithm.reads_decided:
        read = ~canvas.pinned[start:stop]
    return _Window(request_id, work, start, stop, start + np.flatnonzero(read), offset)


def _not_finite_hidden(outputs: Sequence[_Output], hidden: Tensor) -> dict[str, str]:
    """Return a message for each request whose hidden states are not finite: its keys must not be shared."""
    if bool(hidden.isfinite().all()):
        return {}
    finite = hidden.isfinite().all(-1).cpu().numpy()
    return {
        output.row.request_id: "the model's hidden states are not finite "
        f"in positions {output.row.start} to {output.row.end}"
        for output in outputs
        if not finite[output.hidden_start : output.hidden_start + len(output.tokens)].all()
    }


def _not_finite(windows: list[_Window], packed: PackedStatistics) -> dict[str, str]:
    """Return a message for each request that has a NaN or infinite logit sum."""
    if bool(packed.is_finite.all()):
        return {}
    finite = packed.is_finite.cpu().numpy()
    return {
        window.request_id: "the model's logits are not finite (NaN or infinity)"
        for window in windows
        if not finite[window.offset : window.offset + len(window.positions)].all()
    }


def _decide(windows: list[_Window], packed: PackedStatistics) -> dict[str, Decision]:
    """Let each algorithm decide for its rows together."""
    groups: dict[type[Algorithm], list[_Window]] = {}
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


def _stack(members: list[_Window], packed: PackedStatistics) -> tuple[View, Statistics, NDArray[np.int64]]:
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
    members: list[_Window],
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
