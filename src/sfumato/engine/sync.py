"""Agreement on a turn's forward; an engine that is alone runs what it planned."""

from __future__ import annotations

from sfumato.core.plan import StepPlan


class Alone:
    """No peers: the plan stands."""

    def agree(self, plan: StepPlan) -> StepPlan:
        """Return the plan unchanged."""
        return plan
