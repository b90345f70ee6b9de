"""The denoise state of one text request: which rows it wants next, and what their results change.

Letters: L canvas positions, W window positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.handover import CanvasState
from sfumato.core.messages import CanvasView, FinishReason, TokenLogprob, Usage
from sfumato.core.plan import Cost, Decision, Row, RowKind, RowResult
from sfumato.core.request import Progress, Standing
from sfumato.core.spec import TextSpec
from sfumato.core.traits import ModelTraits
from sfumato.errors import RequestError
from sfumato.text.batching import FedRow
from sfumato.text.canvas import Canvas
from sfumato.text.constraint import Constraint
from sfumato.text.context import Context, ExactContext, StaleContext
from sfumato.text.decoding.protocol import Algorithm, Transform
from sfumato.text.delivered import Delivered
from sfumato.text.ends import Ending, EndRule, Step
from sfumato.text.plain_state import decode_state, encode_state
from sfumato.text.walk import Round, Walk

_LOGIT_BYTES = 4


class TextWork:
    """Implements the work protocol over a canvas, a walk on it and a context of cached keys."""

    def __init__(
        self,
        spec: TextSpec,
        traits: ModelTraits,
        *,
        canvas: Canvas,
        algorithm: Algorithm,
        walk: Walk,
        end_rule: EndRule,
        page_size: int,
        excluded_ids: tuple[int, ...],
        constraint: Constraint | None = None,
    ) -> None:
        self.spec = spec
        self.traits = traits
        self.canvas = canvas
        self.algorithm = algorithm
        self.walk = walk
        self.end_rule = end_rule
        self.excluded_ids = excluded_ids
        self.constraint = constraint
        self.transform: Transform = algorithm.transform(traits.eos_token_ids, traits.eot_token_id)
        self.context: Context = (
            ExactContext(canvas, traits.context_granularity) if traits.has_exact_cache else StaleContext()
        )
        self._delivered = Delivered(spec.delivered, canvas.prompt_len)
        self._delivered.commit(canvas, walk)
        self.round: Round | None = walk.next_round(canvas)
        self._page_size = page_size
        self._hit_len = 0
        self._known: tuple[int, ...] = ()
        self._output_end = self._delivered.end
        self._num_undecided = int(np.count_nonzero(canvas.undecided))
        self._denoise_steps = 0
        self._nfe = 0
        self._logprobs: dict[int, TokenLogprob] = {}

    def standing(self, request_id: str) -> Standing:
        """Return where it stands."""
        canvas, step = self.canvas, self.round
        uses_slots, is_exact = self.walk.uses_slots, self.traits.has_exact_cache
        missing = self.context.missing(request_id, canvas, step)
        return Standing(
            request_id=request_id,
            missing=missing,
            denoise=() if step is None else self._rows(request_id, step, rides=missing is None),
            pages_ahead=self._pages_ahead(),
            pages_to_progress=self._pages(canvas.block_end if is_exact else canvas.length),
            pages_at_most=self._pages(canvas.length + self.walk.extra_slots),
            page_size=self._page_size if uses_slots else 0,
            remaining=self._remaining(),
            known_tokens=self._known_tokens(),
            cached_len=self.context.cached_len,
            # Keys depend on how the tokens are cut into blocks, unless each token is encoded by itself.
            cache_key=f"block{canvas.block_length}" if self.traits.context_granularity != 1 else "causal",
            block_length=self._page_size if self.traits.context_granularity == 1 else canvas.block_length,
        )

    def _rows(self, request_id: str, step: Round, *, rides: bool) -> tuple[Row, ...]:
        """Return the rows of the next denoise step; rides: what was committed last may still lack keys."""
        num_read = len(self.read_positions(step))
        denoise = self._denoise_row(request_id, step, "cond", num_read)
        if self.transform.guidance_scale:
            return (denoise, self._denoise_row(request_id, step, "uncond", num_read))
        riding = self.context.riding_row(request_id, self.canvas) if rides else None
        return (denoise,) if riding is None else (riding, denoise)

    def _denoise_row(self, request_id: str, step: Round, branch: str, num_read: int) -> Row:
        feed = step.feed
        logits_bytes = num_read * self.traits.vocab_size * _LOGIT_BYTES
        return Row(
            request_id=request_id,
            kind=RowKind.DENOISE,
            start=feed.start,
            end=feed.end,
            branch=branch,
            slot=feed.slot,
            visible=feed.visible,
            border=feed.border,
            cost=Cost(tokens=feed.end - feed.start, rows=1, logits_bytes=logits_bytes),
        )

    def again(self) -> Round | None:
        """Return the round behind the current one, as if that did not finish its block.

        None where the host must know its outcome first, or the block is sure to end with it.
        """
        algorithm, transform, canvas = self.algorithm, self.transform, self.canvas
        depends = transform.guidance_scale or transform.repeat_penalty or self.end_rule.edits_open
        depends = depends or self.constraint is not None or self._delivered.is_open(canvas)
        if self.round is None or not algorithm.runs_ahead or depends:
            return None
        scheduled = algorithm.scheduled_steps
        if scheduled is not None and canvas.step + 1 >= scheduled // max(1, canvas.num_blocks):
            return None
        return self.walk.again(canvas, self.round)

    def read_positions(self, step: Round) -> NDArray[np.int64]:
        """Return the canvas positions whose logits the algorithm needs."""
        read = step.eligible
        if self.algorithm.reads_decided:
            read = read | ~self.canvas.pinned[step.start : step.stop]
        return step.start + np.flatnonzero(read)

    def fed(self, row: Row, pages: Sequence[int] | None) -> FedRow:
        """Return what a row feeds; guidance hides what the request brought."""
        ids = self.context.input_ids(row, self.canvas)
        if row.branch == "uncond":
            ids = np.where(self.canvas.given[row.start : row.end], self.traits.mask_token_id, ids)
        addend = self.addend if row.kind is RowKind.DENOISE else None
        return FedRow(row, ids, pages, self.canvas.block_length, addend)

    @property
    def addend(self) -> Tensor | None:
        """Return the expected embeddings [W, width] that the next step's tokens are fed with, if any."""
        return self.algorithm.addend(self.canvas.algorithm_state)

    def _pages(self, num_slots: int) -> int:
        return -(-num_slots // self._page_size) if self.walk.uses_slots else 0

    def _pages_ahead(self) -> int:
        """Return the pages up to the end of the next block that is open, or of all that is ever fed."""
        canvas = self.canvas
        if not self.traits.has_exact_cache:
            return self._pages(canvas.length + self.walk.extra_slots)
        behind = np.flatnonzero(canvas.undecided[canvas.block_end :])
        first = canvas.block_end + int(behind[0]) if behind.size else canvas.block_end - 1
        blocks = (first - canvas.origin) // canvas.block_length + 1
        return self._pages(min(canvas.length, canvas.origin + blocks * canvas.block_length))

    def _remaining(self) -> int:
        """Guess from the tokens per step so far; before the first step, from a schedule, or one."""
        canvas, step = self.canvas, self.round
        if step is None:
            return 0
        num_undecided = int(np.count_nonzero(canvas.undecided))
        decided = self._num_undecided - num_undecided
        steps = self.algorithm.scheduled_steps or num_undecided
        if decided > 0:
            steps = num_undecided * self._denoise_steps // decided
        missing = canvas.block_start - self.context.cached_len if self.traits.has_exact_cache else 0
        return missing + max(1, steps) * (step.feed.end - step.feed.start)

    def _known_tokens(self) -> tuple[int, ...]:
        """Return the tokens left of the open block, where their keys are exact."""
        if not self.traits.has_exact_cache:
            return ()
        if len(self._known) != self.canvas.block_start:
            self._known = tuple(self.canvas.token_ids[: self.canvas.block_start].tolist())
        return self._known

    def resume_at(self, cached_len: int) -> None:
        """Continue with this many cached positions; the canvas, decided positions included, is kept."""
        self.context.reset(cached_len)
        if not self._nfe:
            self._hit_len = min(cached_len, self.canvas.prompt_len)

    def arrive(self, cached_len: int, nfe: int) -> None:
        """Take keys that a peer computed as present; its forwards count as the request's."""
        self.context.reset(max(cached_len, self.context.cached_len))
        self._nfe += nfe

    def snapshot(self) -> CanvasState:
        """Return the denoise state, for another process to go on from.

        Raises EngineError in the middle of a block whose algorithm keeps more than plain values and tensors.
        """
        canvas = self.canvas
        return CanvasState(
            token_ids=canvas.token_ids.tobytes(),
            pinned=canvas.pinned.tobytes(),
            undecided=canvas.undecided.tobytes(),
            block_start=canvas.block_start,
            step=canvas.step,
            masks_at_start=canvas.masks_at_start,
            output_end=self._output_end,
            denoise_steps=self._denoise_steps,
            nfe=self._nfe,
            hit_len=self._hit_len,
            algorithm_state=encode_state(canvas.algorithm_state),
            logprobs=dict(self._logprobs),
        )

    def restore(self, state: CanvasState) -> None:
        """Go on, as new work of the same spec, from a snapshot; the keys are still to be found or computed.

        Raises RequestError if it is not of this spec.
        """
        canvas = self.canvas
        if len(state.token_ids) != canvas.token_ids.nbytes:
            raise RequestError(
                f"a state of {len(state.token_ids) // canvas.token_ids.itemsize} positions does not fit a "
                f"canvas of {canvas.length}",
                field="canvas",
            )
        canvas.token_ids[:] = np.frombuffer(state.token_ids, dtype=np.int64)
        canvas.pinned[:] = np.frombuffer(state.pinned, dtype=np.bool_)
        canvas.undecided[:] = np.frombuffer(state.undecided, dtype=np.bool_)
        canvas.block_start, canvas.step = state.block_start, state.step
        canvas.masks_at_start = state.masks_at_start
        canvas.algorithm_state = decode_state(state.algorithm_state)
        self._output_end, self._logprobs = state.output_end, dict(state.logprobs)
        self._denoise_steps, self._nfe, self._hit_len = state.denoise_steps, state.nfe, state.hit_len
        self.context.reset(0)
        self.round = self.walk.next_round(canvas)

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
                self.context.note(result.row)
        if decision is None or self.round is None:
            return Progress()
        self.context.note_step(self.round, self.canvas)
        return self._decide(decision)

    def _decide(self, decision: Decision) -> Progress:
        canvas = self.canvas
        if self._delivered.is_open(canvas):
            decision = self._delivered.hold(decision)
        if self.constraint is not None:
            decision = self.constraint.restrict(
                canvas, decision, decides_at_end=self.algorithm.decides_at_end
            )
        self._denoise_steps += 1
        chosen = self._write(decision)
        if self.spec.logprobs is not None:
            self._note_logprobs(decision, chosen - decision.start)
        canvas.step += 1
        canvas.algorithm_state = decision.state
        view = self._view(decision) if self.spec.include_canvas else None
        self.end_rule.settle(canvas)
        block_end = canvas.block_end
        is_block_done = self.walk.settle(canvas, decision, chosen)
        if is_block_done and not decision.transfer.any() and decision.renoised is None:
            self.context.note_unchanged(block_end)
        ending = self._ending(chosen, is_block_done)
        if ending.reason is None:
            self.round = self.walk.next_round(canvas)
            if self.round is None:
                canvas.close()
                ending = self._ending(chosen, is_block_done)
        return self._emit(ending.output_end, ending.reason, view)

    def _ending(self, written: NDArray[np.int64], is_block_done: bool) -> Ending:
        canvas = self.canvas
        after = Step(
            seen=self._output_end,
            settled=self._settled_end(),
            limit=min(canvas.prompt_len + self.spec.max_tokens, canvas.length),
            is_block_done=is_block_done,
            written=written,
        )
        return self.end_rule.check(canvas, after)

    def _write(self, decision: Decision) -> NDArray[np.int64]:
        """Write a decision and return the positions that it decided."""
        canvas, start = self.canvas, decision.start
        span = slice(start, start + len(decision.tokens))
        if decision.renoised is not None:
            still = canvas.undecided[span] & ~decision.transfer
            canvas.token_ids[span][still] = decision.renoised[still]
        transfer = decision.transfer & ~canvas.pinned[span]
        is_mask = decision.tokens == self.traits.mask_token_id
        chosen: NDArray[np.int64] = start + np.flatnonzero(transfer & ~is_mask)
        canvas.write(chosen, decision.tokens[chosen - start])
        # A mask that a reference lets a model predict, or an algorithm puts there, is open again.
        canvas.reopen(start + np.flatnonzero(transfer & is_mask), self.traits.mask_token_id)
        return chosen

    def _settled_end(self) -> int:
        """Return the end of the contiguous decided prefix that can no longer change."""
        canvas = self.canvas
        if canvas.is_complete:
            return canvas.length
        if not self.algorithm.is_monotone:
            return max(canvas.block_start, self._output_end)
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

    def _note_logprobs(self, decision: Decision, offsets: NDArray[np.int64]) -> None:
        width = self.spec.logprobs or 0
        for offset in offsets.tolist():
            self._logprobs[decision.start + offset] = TokenLogprob(
                logprob=float(decision.logprob[offset]),
                top_ids=tuple(decision.top_ids[offset, :width].tolist()),
                top_logprobs=tuple(decision.top_logprobs[offset, :width].tolist()),
            )

    def _view(self, decision: Decision) -> CanvasView:
        """Return the open window with the best guesses of this step; positions of the prompt are left out."""
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
