"""How many replicas a model needs: by the requests that they have, and by how long their steps take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sfumato.deploy.config import Autoscaling

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

_POLICY = "sfumato.deploy.scaling:StepPolicy"
# Replicas and fronts report so often within the time that is looked back.
_REPORTS = 5
# Steps that are a little slower than they should be are not worth a replica.
_TOLERANCE = 1.1


def desired(
    *,
    num_requests: float,
    num_replicas: int,
    step_seconds: float,
    target_requests: float,
    target_step: float | None,
) -> int:
    """Return how many replicas there should be.

    step_seconds: mean over the replicas. Steps grow with the requests that share them, so that more replicas
    shorten them; where few requests wait for each, no replica would.
    """
    found = num_requests / target_requests
    if target_step is not None and num_requests > num_replicas and step_seconds > _TOLERANCE * target_step:
        found = max(found, num_replicas * step_seconds / target_step)
    return math.ceil(found)


class StepPolicy:
    """The policy as Ray Serve asks it; what it returns is bounded and delayed by Ray."""

    def __init__(self, target_requests: float, target_step_seconds: float | None) -> None:
        self._target_requests = target_requests
        self._target_step_seconds = target_step_seconds

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas and no state."""
        seconds = [each for each in _latest(context, "step_seconds") if each > 0]
        wanted = desired(
            num_requests=context.total_num_requests,
            num_replicas=context.current_num_replicas,
            step_seconds=sum(seconds) / len(seconds) if seconds else 0.0,
            target_requests=self._target_requests,
            target_step=self._target_step_seconds,
        )
        return wanted, {}


def _latest(context: AutoscalingContext, name: str) -> list[float]:
    found: dict[Any, float] = (context.aggregated_metrics or {}).get(name, {})
    return list(found.values())


def autoscaling_options(scaling: Autoscaling) -> dict[str, Any]:
    """Return Ray Serve's form of a model's autoscaling."""
    return {
        "min_replicas": scaling.min_replicas,
        "max_replicas": scaling.max_replicas,
        "target_ongoing_requests": scaling.target_requests,
        "look_back_period_s": scaling.look_back_seconds,
        "metrics_interval_s": scaling.look_back_seconds / _REPORTS,
        "upscale_delay_s": scaling.upscale_delay_seconds,
        "downscale_delay_s": scaling.downscale_delay_seconds,
        "policy": {
            "policy_function": _POLICY,
            "policy_kwargs": {
                "target_requests": scaling.target_requests,
                "target_step_seconds": scaling.target_step_seconds,
            },
        },
    }
