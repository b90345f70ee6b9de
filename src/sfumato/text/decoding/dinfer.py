"""dInfer's parallel decoders (arXiv:2510.08666; `parallel_strategy.py` of inclusionAI/dInfer).

Threshold, hierarchy (each run of masks decides one position) and credit (tokens that stay best gain).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.cache.approximate import Reuse
from sfumato.core.spec import TextSpec
from sfumato.core.traits import ModelTraits
from sfumato.errors import NotSupported
from sfumato.text.canvas import Canvas
from sfumato.text.decoding.protocol import (
    Algorithm,
    Outcome,
    Statistics,
    View,
    cache_parameter,
    check_cache,
    parameter,
    per_row,
)
from sfumato.text.walk import Walk, block_walk

# A position this close to the best one is decided with it.
_NEAR = 1e-5
_CREDIT_DECAY = 0.8
_CREDIT_POWER = 0.2
_CREDIT_WEIGHT = 0.7


@dataclass(frozen=True, slots=True)
class DInfer(Algorithm):
    """Each step decides the best position, all at the threshold, and what the rule adds.

    The state of credit is per position of the block a dict of token -> credit.
    """

    rule: str = parameter(
        "threshold", "what is decided beside the best", choices=("threshold", "hierarchy", "credit")
    )
    threshold: float = parameter(0.9, "positions at least this confident are decided together", minimum=0.0)
    low_threshold: float = parameter(
        0.4, "hierarchy: the best of each run of masks is decided above this confidence", minimum=0.0
    )
    cache: str = cache_parameter()

    def walk(self, canvas: Canvas, spec: TextSpec, traits: ModelTraits) -> Walk:
        """Go block by block, reusing keys as `cache` says; credit takes best tokens, not drawn ones."""
        if self.rule == "credit" and not spec.sampling.is_greedy:
            raise NotSupported(
                "rule 'credit' takes the best tokens; it needs temperature 0",
                field="temperature",
                value=spec.sampling.temperature,
                limit=0,
            )
        return block_walk(traits, Reuse(self.cache))

    def check(self, *, block_length: int, num_blocks: int, is_bidirectional: bool) -> None:
        """An exact cache needs no approximate one."""
        check_cache(self.cache, is_bidirectional)

    def asked_ids(self, token_ids: NDArray[np.int64], state: Any) -> NDArray[np.int64] | None:
        """Ask for the log probabilities of the tokens that have credit."""
        if self.rule != "credit" or state is None:
            return None
        most = max((len(gains) for gains in state), default=0)
        ids = np.full((len(token_ids), most), -1, dtype=np.int64)
        for offset, gains in enumerate(state):
            ids[offset, : len(gains)] = list(gains)
        return ids if most else None

    @staticmethod
    def decide(rows: Sequence[DInfer], view: View, statistics: Statistics, states: Sequence[Any]) -> Outcome:
        """Let credit change the guesses, then apply each row's rule."""
        token, confidence = statistics.token.clone(), statistics.confidence.clone()
        new_states: list[Any] = [None] * len(rows)
        for index, row in enumerate(rows):
            if row.rule == "credit":
                token[index], confidence[index], new_states[index] = _with_credit(
                    view, statistics, states[index], index
                )
        eligible = view.eligible & (token != per_row(view.mask_token_id, view)[:, None])
        masked = confidence.masked_fill(~eligible, -torch.inf)
        best = masked.max(-1, keepdim=True).values
        threshold = per_row((row.threshold for row in rows), view)[:, None]
        transfer = masked >= torch.minimum(threshold, best - _NEAR)
        for index, row in enumerate(rows):
            if row.rule == "hierarchy":
                runs = _best_of_runs(view.eligible[index], masked[index], row.low_threshold)
                strictly = masked[index] > row.threshold
                transfer[index] = runs | strictly | (masked[index] >= best[index])
        return Outcome(transfer=transfer & eligible, tokens=token, states=new_states)


def _best_of_runs(eligible: Tensor, confidence: Tensor, low_threshold: float) -> Tensor:
    """Return bool[W]: the most confident position of each maximal run of masks, if above the threshold."""
    chosen = torch.zeros_like(eligible)
    run: list[int] = []
    for position, is_open in enumerate([*eligible.tolist(), False]):
        if is_open:
            run.append(position)
            continue
        if run:
            best = run[int(confidence[run].argmax())]
            chosen[best] = confidence[best] > low_threshold
        run = []
    return chosen


def _with_credit(
    view: View, statistics: Statistics, state: list[dict[int, float]] | None, index: int
) -> tuple[Tensor, Tensor, list[dict[int, float]]]:
    """Return the guesses i64[W] and probabilities f32[W] of one row under its credit, and the new credit.

    The logits of tokens with credit c rise by 0.7 log(c + 1); the sum of exponentials is corrected for them.
    """
    token, confidence = statistics.token[index].clone(), statistics.confidence[index].clone()
    asked = {} if state is None or statistics.asked_logprobs is None else state
    # The window may be padded to that of a neighbour; the state is the row's own.
    length = view.block_length[index]
    credit = [{} for _ in range(length)] if state is None else [dict(gains) for gains in state]
    for offset in torch.nonzero(view.eligible[index]).flatten().tolist():
        own, best, top = credit[offset], int(token[offset]), float(confidence[offset])
        logs = {best: float(np.log(max(top, 1e-30)))}
        if asked and statistics.asked_logprobs is not None:
            found = statistics.asked_logprobs[index, offset].tolist()
            logs |= dict(zip(state[offset] if state else (), found, strict=False))
        for known in own:
            own[known] *= _CREDIT_DECAY
        own[best] = own.get(best, 0.0) + top**_CREDIT_POWER
        raised = {known: log + _CREDIT_WEIGHT * float(np.log(own[known] + 1)) for known, log in logs.items()}
        total = 1 + sum(float(np.exp(raised[known]) - np.exp(logs[known])) for known in raised)
        winner = max(raised, key=lambda known: raised[known])
        token[offset], confidence[offset] = winner, float(np.exp(raised[winner])) / total
    return token, confidence, credit
