"""Shared weights: ranks with requests and keys of their own meet in the layers whose weights are divided.

In such a layer the tokens of all ranks are gathered, each rank computes its part of the weights for all of
them, and each takes back the sums of its own. A rank without tokens takes part with none.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core.plan import StepPlan, StepResult
from sfumato.core.protocols import Runner
from sfumato.core.request import Request
from sfumato.errors import EngineError
from sfumato.models.language_model import LanguageModel
from sfumato.parallel.groups import Group


class MeetingRanks:
    """Ranks that hold the divided layers together; the group is there once they have met.

    num_met: how many layers of the present forward all ranks have computed.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.group: Group | None = None
        self.num_met = 0
        # Tokens of each rank in the layer where they are now.
        self._counts: list[int] | None = None

    def _group(self) -> Group:
        if self.group is None:
            raise EngineError(f"rank {self.rank} of {self.size} was used before the ranks met")
        return self.group

    def enter(self, x: Tensor) -> Tensor:
        """Return the tokens [N', ...] of all ranks, in rank order; x: [N, ...] of this one."""
        group = self._group()
        if self._counts is None:
            # On the CPU: sizes are needed there.
            self._counts = [int(count) for count in group.all_gather(torch.tensor([len(x)]))]
        most = max(self._counts)
        padded = F.pad(x, (0, 0, 0, most - len(x))).contiguous()
        parts = group.all_gather(padded)
        return torch.cat([part[:count] for part, count in zip(parts, self._counts, strict=True)])

    def leave(self, partial: Tensor) -> Tensor:
        """Return this rank's rows of the sum of all ranks' partial results [N', width]."""
        counts, self._counts = self._counts, None
        assert counts is not None, "a layer is entered before it is left"
        total = self._group().sum_(partial.contiguous())
        self.num_met += 1
        first = sum(counts[: self.rank])
        return total[first : first + counts[self.rank]]

    def sum(self, x: Tensor) -> Tensor:
        """Refuse: only whole layers are divided."""
        raise EngineError("ranks with tokens of their own have nothing to add up outside of their layers")

    def join(self, part: Tensor, total: int) -> Tensor:
        """Refuse: only whole layers are divided."""
        raise EngineError("ranks with tokens of their own have no parts to join")


class LockstepRunner:
    """Launches plans so that every rank makes the same shared layers in every turn.

    inner: runs the rows; must make one forward a launch, also when it fails.
    """

    def __init__(self, inner: Runner, model: LanguageModel, ranks: MeetingRanks) -> None:
        self._inner = inner
        self._model = model
        self._ranks = ranks

    def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult:
        """Run a plan, or without rows the shared layers alone."""
        self._ranks.num_met = 0
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
        self._model.take_no_part(self._ranks.num_met)
