"""Launches of ranks that share weights: every rank makes the same shared layers in every turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from sfumato.core.plan import StepPlan, StepResult
from sfumato.core.protocols import Runner
from sfumato.core.request import Request
from sfumato.errors import EngineError
from sfumato.models.language_model import LanguageModel
from sfumato.parallel.meeting import MeetingRanks
from sfumato.parallel.voting import VotedGraphs


class LockstepRunner:
    """Launches plans so that every rank makes the same shared layers in every turn.

    inner: runs the rows; must make one forward a launch, also when it fails.
    explain: says which rank is behind a broken collective. graphs: the forwards that all ranks replay.
    """

    def __init__(
        self,
        inner: Runner,
        model: LanguageModel,
        ranks: MeetingRanks,
        explain: Callable[[EngineError], EngineError],
        graphs: VotedGraphs | None = None,
    ) -> None:
        self._inner = inner
        self._graphs = graphs
        self._explain = explain
        self._model = model
        self._ranks = ranks

    def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult:
        """Run a plan, or without rows the shared layers alone. Raises EngineError where a rank is lost."""
        try:
            return self._launch(plan, live)
        except EngineError as error:
            raise self._explain(error) from error

    def _launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult:
        self._ranks.num_met = 0
        if self._graphs is not None:
            self._graphs.open(by_graph=plan.by_graph)
        if plan.rows:
            result = self._inner.launch(plan, live)
            # Nothing is left of a forward that went well. Of one that failed on this rank, the others wait.
            self._finish()
            return result
        started = time.perf_counter()
        self._finish()
        return StepResult(launch_id=plan.launch_id, rows=(), device_seconds=time.perf_counter() - started)

    @torch.inference_mode()
    def _finish(self) -> None:
        if self._graphs is None or not self._graphs.finish():
            self._model.take_no_part(self._ranks.num_met)
