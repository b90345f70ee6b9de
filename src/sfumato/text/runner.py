"""Runs the rows of a plan: one forward, one pass of statistics, one call per decoding algorithm.

Letters: R rows of one algorithm, W window positions, M packed positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.plan import Decision, RowResult, Scores, StepPlan, StepResult
from sfumato.core.recording import UNRECORDED, Recorder
from sfumato.core.request import Request
from sfumato.core.traits import ModelTraits
from sfumato.errors import EngineError
from sfumato.models.attending import Attention
from sfumato.models.batch import Batch, KVStore
from sfumato.models.graphs import Replays
from sfumato.text.batching import FedRow
from sfumato.text.begun import Begun
from sfumato.text.deciding import Decided, decide, read_decisions
from sfumato.text.paged_batching import batch_of
from sfumato.text.statistics import PackedStatistics, compute_statistics
from sfumato.text.windows import Output, Readable, read_scores, readings_of, row_outputs, show_advanced


class TextModel(Protocol):
    """The part of a model that a step uses."""

    @property
    def device(self) -> torch.device: ...

    def hidden(self, batch: Batch) -> Tensor: ...

    def head(self, hidden: Tensor) -> Tensor: ...

    def soft_embedding(self, probabilities: Tensor) -> Tensor: ...


# Called with the rows of the next forward and its output tokens i64[P], by ranks that lead others.
Announce = Callable[[Sequence[FedRow], NDArray[np.int64]], None]


class TextRunner:
    """Launches plans of text rows on one model.

    chunk_bytes bounds the float32 logits that exist at one time. is_lockstep: other ranks make a forward with
    each of this one's, so that none can be repeated: where one raises, all of its requests fail. graphs:
    recorded forwards, for the batches that fit one. attention: what computes it over pages.
    """

    def __init__(
        self,
        model: TextModel,
        traits: ModelTraits,
        *,
        store: KVStore | None,
        page_size: int,
        chunk_bytes: int,
        announce: Announce | None = None,
        is_lockstep: bool = False,
        recorder: Recorder = UNRECORDED,
        graphs: Replays | None = None,
        attention: Attention = Attention(),
    ) -> None:
        self._model = model
        self._traits = traits
        self._store = store
        self._page_size = page_size
        self._chunk_bytes = chunk_bytes
        self._announce = announce
        self._is_lockstep = is_lockstep
        self._recorder = recorder
        self._graphs = graphs
        self._attention = attention
        self._read_at = 0.0

    def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult:
        """Run a plan. A request whose rows raise, or whose logits are not finite, fails alone."""
        started = time.perf_counter()
        try:
            return self.finish(self.begin(plan, live))
        except (EngineError, KeyboardInterrupt):
            raise
        except Exception as error:
            rows = self._failed(plan, error) if self._is_lockstep else self._run_apart(plan, live, error)
        return StepResult(
            launch_id=plan.launch_id, rows=tuple(rows), device_seconds=time.perf_counter() - started
        )

    def _run_apart(self, plan: StepPlan, live: Mapping[str, Request], error: Exception) -> list[RowResult]:
        """Run each request's rows alone after a joint forward has raised, to find the one at fault."""
        ids = plan.request_ids()
        if len(ids) == 1:
            return self._failed(plan, error)
        results: list[RowResult] = []
        for request_id in ids:
            rows = tuple(row for row in plan.rows if row.request_id == request_id)
            results.extend(self.launch(StepPlan(launch_id=plan.launch_id, rows=rows), live).rows)
        return results

    def _failed(self, plan: StepPlan, error: Exception) -> list[RowResult]:
        message = f"{type(error).__name__}: {error}"
        return [RowResult(row=row, error=message) for row in plan.rows]

    @torch.inference_mode()
    def begin(self, plan: StepPlan, live: Mapping[str, Request], behind: Begun | None = None) -> Begun:
        """Start a plan's forward, statistics and decisions; on a GPU nothing here waits for them.

        behind: the launch before, where its outcome is not read yet. Rows that it decides too go on from what
        the device has of them.
        """
        started = time.perf_counter()
        region = self._recorder.region
        with region("layout"):
            batch, outputs = self._laid_out(plan, live, behind)
        with region("forward"):
            hidden = (self._model if self._graphs is None else self._graphs).hidden(batch)
        windows = [output.window for output in outputs if output.window is not None]
        decided: list[Decided] = []
        packed: PackedStatistics | None = None
        readings = readings_of(outputs)
        if readings:
            with region("statistics"):
                packed = compute_statistics(
                    hidden,
                    self._model.head,
                    readings,
                    vocab_size=self._traits.vocab_size,
                    chunk_bytes=self._chunk_bytes,
                    embed=self._model.soft_embedding if self._traits.has_self_conditioning else None,
                )
            with region("decide"):
                decided = decide(windows, packed) if windows else []
        return Begun(plan, outputs, decided, packed, hidden.isfinite().all(-1), started)

    def _laid_out(
        self, plan: StepPlan, live: Mapping[str, Request], behind: Begun | None
    ) -> tuple[Batch, list[Output]]:
        """Return the tensors of a plan's forward and what is read of each row; other ranks hear of both."""
        # A text lane only ever holds text work and scoring.
        works = {row.request_id: cast(Readable, live[row.request_id].work) for row in plan.rows}
        fed = []
        for row in plan.rows:
            lease = live[row.request_id].lease
            fed.append(works[row.request_id].fed(row, None if lease is None else lease.pages))
        outputs = row_outputs(plan, works, {} if behind is None else behind.advanced(plan))
        output_tokens = np.concatenate([output.tokens for output in outputs])
        batch = batch_of(
            fed,
            traits=self._traits,
            output_tokens=output_tokens,
            store=self._store,
            page_size=self._page_size,
            device=self._model.device,
            graphs=self._graphs,
            attention=self._attention,
        )
        show_advanced(batch.token_ids, outputs)
        if self._announce is not None:
            self._announce(fed, output_tokens)
        return batch, outputs

    def finish(self, begun: Begun) -> StepResult:
        """Read what came of a launch; the canvases are as they were before it."""
        with self._recorder.region("read"):
            return self._finish(begun)

    def _finish(self, begun: Begun) -> StepResult:
        begun.wait()
        # One that began before the one in front of it was read had the device from then on.
        now = time.perf_counter()
        device_seconds, self._read_at = now - max(begun.started, self._read_at), now
        failures = begun.failures()
        decisions: dict[str, Decision] = {}
        scores: dict[int, Scores] = {}
        if begun.packed is not None:
            for decided in begun.decided:
                decisions |= read_decisions(decided, begun.packed)
            scores = read_scores(begun.outputs, begun.packed)
        rows, num_past = [], 0
        for index, output in enumerate(begun.outputs):
            row, request_id = begun.row(output), output.row.request_id
            is_past = output.window is not None and output.window.is_past
            num_past += is_past
            decision = None if is_past or output.window is None else decisions[request_id]
            error = failures.get(request_id)
            rows.append(RowResult(row=row, decision=decision, scores=scores.get(index), error=error))
        return StepResult(
            launch_id=begun.plan.launch_id,
            rows=tuple(rows),
            device_seconds=device_seconds,
            num_past=num_past,
        )
