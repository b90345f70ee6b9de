"""d3LLM's multi-block decoding by entropy (arXiv:2601.07568, 3.3; hao-ai-lab/d3LLM).

Served, masks are recounted from the canvas, text behind the first end token is never decided, and a cached
slice of a model with shifted logits begins one position early instead of with wrong logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sfumato.core.spec import TextSpec
from sfumato.core.traits import ModelTraits
from sfumato.text.canvas import Canvas
from sfumato.text.decoding.multi_block import MultiBlockRules, MultiBlockWalk
from sfumato.text.decoding.protocol import (
    Algorithm,
    Outcome,
    Statistics,
    View,
    Wanted,
    parameter,
    per_row,
    require_bidirectional,
)
from sfumato.text.decoding.ranking import rank_descending
from sfumato.text.walk import Walk

# From here on the published code takes the loop without a cache.
_NEVER_CACHED = 10_000


@dataclass(frozen=True, slots=True)
class D3LLM(Algorithm):
    """Each step decides all open blocks' positions of low entropy, and one in the first block that must."""

    threshold: float = parameter(0.45, "positions of lower entropy are decided, in nats", minimum=0.0)
    block_add_threshold: float = parameter(
        0.1,
        "the next block opens when this share of the newest is decided",
        minimum=0.0,
        maximum=1.0,
    )
    decoded_token_threshold: float = parameter(
        0.95,
        "a block whose predecessor is decided to this share decides a position in every step",
        minimum=0.0,
        maximum=1.0,
    )
    cache_delay_iter: int | None = parameter(
        None, "steps between a block's last decision and its caching; null: no cache", minimum=0
    )
    refresh_interval: int = parameter(10_000, "steps between refreshes of the cache", minimum=1)
    early_stop: bool = parameter(True, "decide nothing behind the first end token")
    variant: str = parameter(
        "dream",
        "whose rule: llada also always decides the position of lowest entropy, and those at the threshold",
        choices=("llada", "dream"),
    )
    # Reference variant: the published loop with its stale masks and its own end.
    is_reference: bool = False
    # Reference variant: the end token's id there.
    reference_eos: int | None = None

    @property
    def wanted(self) -> Wanted:
        return Wanted(entropy=True)

    def walk(self, canvas: Canvas, spec: TextSpec, traits: ModelTraits) -> Walk:
        """Open blocks from the prompt's end on."""
        delay = self.cache_delay_iter
        ends = frozenset(spec.stop_token_ids)
        if self.is_reference:
            ends = frozenset(() if self.reference_eos is None else (self.reference_eos,))
            # LLaDA's two loops are two functions; Dream's one dispatches on the delay.
            delay = None if self.variant == "dream" and (delay or 0) >= _NEVER_CACHED else delay
        rules = MultiBlockRules(
            block_length=canvas.block_length,
            add_threshold=self.block_add_threshold,
            decoded_threshold=self.decoded_token_threshold,
            cache_delay=delay,
            refresh_interval=self.refresh_interval,
            stop_ids=ends if self.early_stop else frozenset(),
            border=int(traits.shifts_logits and not self.is_reference),
            reference=self.variant if self.is_reference else "",
        )
        return MultiBlockWalk(rules, canvas.prompt_len, canvas.length)

    def check(self, *, block_length: int, num_blocks: int, is_bidirectional: bool) -> None:
        """All open blocks must see one another."""
        require_bidirectional("variant", self.variant, is_bidirectional)

    @staticmethod
    def decide(rows: Sequence[D3LLM], view: View, statistics: Statistics, states: Sequence[Any]) -> Outcome:
        """Compare entropies with the thresholds; the focus gets a position if nothing else is in it."""
        assert statistics.entropy is not None
        entropy, eligible = statistics.entropy, view.eligible
        threshold = per_row((row.threshold for row in rows), view)[:, None]
        is_llada = per_row((row.variant == "llada" for row in rows), view)[:, None]
        takes = torch.where(is_llada, entropy <= threshold, entropy < threshold)
        takes |= is_llada & (rank_descending(-entropy, eligible) == 0)
        takes &= eligible
        candidates = eligible & view.focus
        lowest = (rank_descending(-entropy, candidates) == 0) & candidates
        has_progress = (takes & view.focus).any(-1, keepdim=True)
        return Outcome(transfer=takes | (lowest & ~has_progress), tokens=statistics.token)
