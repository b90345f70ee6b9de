"""From answered questions to figures: accuracy with its interval, tokens per forward, and the AUP score."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec

from sfumato.core.spec import ParameterValue
from sfumato.evaluation.journal import Record
from sfumato.evaluation.sweep import Setting

# The normal distribution's quantile of a two-sided interval of 95 %.
_Z = 1.959963984540054
# arXiv:2601.07568: how fast accuracy that is lost loses its weight, and percentage points that may be lost.
AUP_ALPHA = 3.0
AUP_MARGIN = 5.0


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One setting in figures; accuracies in percent of all questions, those that failed among them.

    tpf: emitted tokens over forwards, both summed over the answered questions. mean_request_tpf: the mean of
    each question's own ratio. Forwards and mean_nfe count a prefill also where the prefix cache spared it,
    which num_spared_prefills says. tokens_per_second: of wall time. None: nothing was answered.
    """

    parameter: str | None
    value: ParameterValue
    parameters: dict[str, Any]
    is_default: bool
    num_questions: int
    num_correct: int
    num_failed: int
    num_cut_off: int
    num_spared_prefills: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    tpf: float | None
    mean_request_tpf: float | None
    mean_nfe: float | None
    mean_tokens: float | None
    mean_seconds: float | None
    tokens_per_second: float | None
    failures: tuple[tuple[str, str], ...]

    @property
    def shown_value(self) -> str:
        """Return the swept value for people."""
        return self.value if isinstance(self.value, str) else json.dumps(self.value)


def score(setting: Setting, records: Sequence[Record]) -> Point:
    """Return the figures of one setting's questions."""
    answered = [record for record in records if record.error is None]
    num_correct = sum(record.correct for record in answered)
    low, high = wilson_interval(num_correct, len(records))
    tokens = sum(record.tokens for record in answered)
    forwards = sum(record.forwards for record in answered)
    wall_seconds = sum(record.wall_seconds for record in records)
    return Point(
        parameter=setting.parameter,
        value=setting.value,
        parameters=setting.effective,
        is_default=setting.is_default,
        num_questions=len(records),
        num_correct=num_correct,
        num_failed=len(records) - len(answered),
        num_cut_off=sum(record.finish_reason == "length" for record in answered),
        num_spared_prefills=sum(record.was_spared_prefill for record in answered),
        accuracy=100 * num_correct / len(records),
        accuracy_low=low,
        accuracy_high=high,
        tpf=tokens / forwards if forwards else None,
        mean_request_tpf=_mean([record.tokens / record.forwards for record in answered if record.forwards]),
        mean_nfe=_mean([record.forwards for record in answered]),
        mean_tokens=_mean([record.tokens for record in answered]),
        mean_seconds=_mean([record.seconds for record in answered]),
        tokens_per_second=tokens / wall_seconds if answered and wall_seconds else None,
        failures=tuple((record.id, record.error) for record in records if record.error is not None),
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def wilson_interval(num_correct: int, number: int) -> tuple[float, float]:
    """Return the bounds in percent between which the true share lies with 95 % confidence (Wilson 1927)."""
    share, z_squared = num_correct / number, _Z * _Z
    middle = share + z_squared / (2 * number)
    spread = _Z * math.sqrt(share * (1 - share) / number + z_squared / (4 * number * number))
    scale = 1 + z_squared / number
    return max(0.0, 100 * (middle - spread) / scale), min(100.0, 100 * (middle + spread) / scale)


def accuracy_under_parallelism(points: Sequence[tuple[float, float]], best_accuracy: float) -> float | None:
    """Return the AUP score of (tokens per forward, accuracy in percent) pairs; None without any.

    With the pairs (rho_i, y_i) in the order of rho, those below y_1 - 5 left out, the score is
    rho_1 y_1 + 1/2 sum_{i>1} (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})), where
    W(y) = min(exp(-3 (1 - y / best_accuracy)), 1) (arXiv:2601.07568). Of equal rho the most accurate goes
    first, where the source wants them to differ; where best_accuracy is 0 the score is 0.
    """
    ordered = sorted(points, key=lambda point: (point[0], -point[1]))
    if not ordered or best_accuracy <= 0:
        return 0.0 if ordered else None
    first_rho, first_accuracy = ordered[0]
    kept = [point for point in ordered if point[1] >= first_accuracy - AUP_MARGIN]

    def weighted(accuracy: float) -> float:
        return accuracy * min(math.exp(-AUP_ALPHA * (1 - accuracy / best_accuracy)), 1.0)

    area = first_rho * first_accuracy
    for (rho_before, before), (rho, accuracy) in pairwise(kept):
        area += (rho - rho_before) * (weighted(accuracy) + weighted(before)) / 2
    return area
