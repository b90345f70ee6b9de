"""The denoise state of one text request: which rows it wants next, and what their results change.

Letters: L canvas positions, B block length.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sfumato.core.messages import CanvasView, FinishReason, TokenLogprob, Usage
from sfumato.core.plan import Cost, Decision, Row, RowKind, RowResult
from sfumato.core.request import Progress
from sfumato.core.spec import TextSpec
from sfumato.core.traits import ModelTraits
from sfumato.text.canvas import Canvas
from sfumato.text.decoding.protocol import Algorithm, Transform
from sfumato.text.ends import EndRule

_LOGIT_BYTES = 4


class TextWork:
    """Implements the work protocol for block-causal models (exact cache) and bidirectional ones (none)."""

    def __init__(
        self,
        spec: TextSpec,
        traits: ModelTraits,
        *,
        canvas: Canvas,
        algorithm: Algorithm,
        end_rule: EndRule,
        page_size: int,
        excluded_ids: tuple[int, ...],
    ) -> None:
        self.spec = spec
        self.traits = traits
        self.canvas = canvas
        self.algorithm = algorithm
        self.end_rule = end_rule
        self.excluded_ids = excluded_ids
        self.transform: Transform = algorithm.transform(traits.eos_token_ids, traits.eot_token_id)
        self._page_size = page_size
        self._cached_len = 0
        self._hit_len = 0
        self._known: tuple[int, ...] = ()
        self._output_end = canvas.prompt_len
        self._denoise_steps = 0
        self._nfe = 0
        self._logprobs: dict[int, TokenLogprob] = {}

    def phase(self) -> RowKind:
        """Return PREFILL while known blocks lack keys and values, but for a block that was just denoised."""
        if not self.traits.has_exact_cache or self._cached_len == self.canvas.block_start:
            return RowKind.DENOISE
        return RowKind.DENOISE if self._commit_rides() else RowKind.PREFILL

    def _commit_rides(self) -> bool:
        """Whether what lacks keys and values is one block that came out of denoising."""
        missing = self.canvas.block_start - self._cached_len
        first_open = self.canvas.prompt_len // self.canvas.block_length * self.canvas.block_length
        return missing == self.canvas.block_length and self._cached_len >= first_open

    def rows(self, request_id: str, max_tokens: int) -> tuple[Row, ...]:
        """Return the rows of the next step; a prefill takes whole blocks, one at least."""
        canvas = self.canvas
        if self.phase() is RowKind.PREFILL:
            block = canvas.block_length
            end = min(canvas.block_start, self._cached_len + max(block, max_tokens // block * block))
            return (_row(request_id, RowKind.PREFILL, self._cached_len, end),)
        num_open = int(canvas.undecided[canvas.block_start : canvas.block_end].sum())
        logits_bytes = num_open * self.traits.vocab_size * _LOGIT_BYTES
        if not self.traits.has_exact_cache:
            cond = _row(request_id, RowKind.DENOISE, 0, canvas.length, logits_bytes=logits_bytes)
            if not self.transform.guidance_scale:
                return (cond,)
            uncond = _row(
                request_id, RowKind.DENOISE, 0, canvas.length, branch="uncond", logits_bytes=logits_bytes
            )
            return (cond, uncond)
        denoise = _row(
            request_id, RowKind.DENOISE, canvas.block_start, canvas.block_end, logits_bytes=logits_bytes
        )
        if self._cached_len < canvas.block_start:
            return (_row(request_id, RowKind.COMMIT, self._cached_len, canvas.block_start), denoise)
        return (denoise,)

    def pages_for(self, rows: tuple[Row, ...]) -> int:
        """Return how many pages hold everything up to the last position that is fed."""
        return self._pages(max(row.end for row in rows))

    def pages_to_progress(self) -> int:
        """Return the pages up to the end of the open block."""
        return self._pages(self.canvas.block_end)

    def pages_at_most(self) -> int:
        """Return the pages of the whole canvas."""
        return self._pages(self.canvas.length)

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size) if self.traits.has_exact_cache else 0

    def known_tokens(self) -> tuple[int, ...]:
        """Return the tokens left of the open block."""
        if not self.traits.has_exact_cache:
            return ()
        if len(self._known) != self.canvas.block_start:
            self._known = tuple(self.canvas.token_ids[: self.canvas.block_start].tolist())
        return self._known

    def cache_key(self) -> str:
        """Keys and values depend on how the tokens are cut into blocks."""
        return f"block{self.canvas.block_length}"

    @property
    def block_length(self) -> int:
        """Return B."""
        return self.canvas.block_length

    def resume_at(self, cached_len: int) -> None:
        """Continue with this many cached positions; the canvas, decided positions included, is kept."""
        self._cached_len = cached_len
        if not self._nfe:
            self._hit_len = min(cached_len, self.canvas.prompt_len)

    def cached_len(self) -> int:
        """Return how many leading positions have final keys and values."""
        return self._cached_len

    def usage(self) -> Usage:
        """Return what the request has cost so far."""
        return Usage(
            prompt_tokens=self.canvas.prompt_len,
            completion_tokens=self._output_end - self.canvas.prompt_len,
            cached_tokens=self._hit_len,
            denoise_steps=self._denoise_steps,
            nfe=self._nfe,
        )

    def advance(self, results: list[RowResult]) -> Progress:
        """Apply one step: final keys and values of prefilled and committed blocks, then the decision."""
        self._nfe += 1
        decision: Decision | None = None
        for result in results:
            if result.row.kind is RowKind.DENOISE:
                decision = result.decision or decision
            else:
                self._cached_len = max(self._cached_len, result.row.end)
        if decision is None:
            return Progress()
        return self._decide(decision)

    def _decide(self, decision: Decision) -> Progress:
        canvas = self.canvas
        self._denoise_steps += 1
        # A mask id that a reference lets a model predict is written and decides nothing.
        transfer = decision.transfer & ~canvas.pinned[decision.start : decision.start + len(decision.tokens)]
        chosen = np.flatnonzero(transfer & (decision.tokens != self.traits.mask_token_id))
        canvas.write(decision.start + chosen, decision.tokens[chosen])
        if self.spec.logprobs is not None:
            self._note_logprobs(decision, chosen)
        canvas.step += 1
        canvas.algorithm_state = decision.state
        view = self._view(decision) if self.spec.include_canvas else None
        self.end_rule.settle(canvas)
        is_block_done = decision.done
        if is_block_done is None:
            is_block_done = not bool(canvas.undecided[canvas.block_start : canvas.block_end].any())
        if is_block_done:
            canvas.commit_block()
        ending = self.end_rule.check(
            canvas,
            seen=self._output_end,
            settled=self._settled_end(),
            limit=min(canvas.prompt_len + self.spec.max_tokens, canvas.length),
            is_block_done=is_block_done,
        )
        return self._emit(ending.output_end, ending.reason, view)

    def _settled_end(self) -> int:
        """Return the end of the contiguous decided prefix that can no longer change."""
        canvas = self.canvas
        if canvas.is_complete:
            return canvas.length
        if not self.algorithm.is_monotone:
            return max(canvas.block_start, canvas.prompt_len)
        start = max(self._output_end, canvas.prompt_len)
        gap = canvas.undecided[start:]
        return start + int(gap.argmax()) if gap.any() else canvas.length

    def _emit(self, output_end: int, reason: FinishReason | None, view: CanvasView | None) -> Progress:
        start, self._output_end = self._output_end, output_end
        tokens = tuple(self.canvas.token_ids[start:output_end].tolist())
        logprobs = None
        if self.spec.logprobs is not None:
            pinned = TokenLogprob(logprob=0.0)
            logprobs = tuple(self._logprobs.pop(position, pinned) for position in range(start, output_end))
        return Progress(token_ids=tokens, logprobs=logprobs, canvas=view, finish_reason=reason)

    def _note_logprobs(self, decision: Decision, chosen: Any) -> None:
        width = self.spec.logprobs or 0
        for offset in chosen.tolist():
            self._logprobs[decision.start + offset] = TokenLogprob(
                logprob=float(decision.logprob[offset]),
                top_ids=tuple(decision.top_ids[offset, :width].tolist()),
                top_logprobs=tuple(decision.top_logprobs[offset, :width].tolist()),
            )

    def _view(self, decision: Decision) -> CanvasView:
        """Return the open block with the best guesses of this step; positions of the prompt are left out."""
        canvas = self.canvas
        start = max(decision.start, canvas.prompt_len)
        span = slice(start - decision.start, len(decision.tokens))
        undecided = canvas.undecided[start : start + len(decision.tokens[span])]
        written = canvas.token_ids[start : start + len(undecided)]
        tokens = np.where(undecided, decision.tokens[span], written)
        return CanvasView(
            step=self._denoise_steps,
            start=start - canvas.prompt_len,
            token_ids=tuple(tokens.tolist()),
            confidence=tuple(round(value, 6) for value in decision.confidence[span].tolist()),
            undecided=tuple(undecided.tolist()),
        )


def _row(
    request_id: str, kind: RowKind, start: int, end: int, *, branch: str = "cond", logits_bytes: int = 0
) -> Row:
    cost = Cost(tokens=end - start, rows=1, logits_bytes=logits_bytes)
    return Row(request_id=request_id, kind=kind, start=start, end=end, branch=branch, cost=cost)
