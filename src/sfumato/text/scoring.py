"""Log likelihoods: exact and block by block where the context is causal, by Monte Carlo where it is not.

Letters: N tokens of prompt and target, T target tokens, S samples, B block length.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from sfumato.core.messages import FinishReason, Score, TokenLogprob, Usage
from sfumato.core.plan import Cost, Row, RowKind, RowResult, Scores
from sfumato.core.request import Missing, Progress, Standing
from sfumato.core.spec import ScoreSpec
from sfumato.core.traits import ModelTraits
from sfumato.errors import EngineError, NotSupported, RequestError
from sfumato.text.batching import FedRow
from sfumato.text.checks import check_range, check_tokens

_LOGIT_BYTES = 4
# Tokens of scoring rows that an exactly scored request keeps keys of at one time.
_SCRATCH_TOKENS = 512


_MAX_SAMPLES = 100_000
_MAX_SCALE = 100.0


def check_score(spec: ScoreSpec, traits: ModelTraits, page_size: int) -> None:
    """Raise RequestError for what can never be scored, naming the field and its limit."""
    check_tokens("prompt", spec.prompt_ids, traits.vocab_size)
    check_tokens("completion", spec.target_ids, traits.vocab_size)
    if not spec.target_ids:
        raise RequestError("the completion is empty; there is nothing to score", field="completion", limit=1)
    if (
        not traits.has_mask_token
        or traits.context_granularity == 1
        or (traits.shifts_logits and traits.has_exact_cache)
    ):
        raise NotSupported(
            f"models of the family {traits.family} have no likelihood that is computed here",
            field="model",
            value=traits.family,
        )
    block = spec.block_length
    length = len(spec.prompt_ids) + len(spec.target_ids)
    end = -(-length // block) * block if traits.has_exact_cache else length
    if end > traits.context_length:
        raise RequestError(
            f"prompt and completion take {end} tokens of a context of {traits.context_length}",
            field="completion",
            value=end,
            limit=traits.context_length,
        )
    if traits.has_exact_cache:
        check_range("num_samples", spec.num_samples, 0, 0)
        check_range("cfg_scale", spec.cfg_scale, 0.0, 0.0)
        if block % page_size:
            raise NotSupported(
                f"block_length {block} is not a whole number of pages of {page_size} tokens",
                field="block_length",
                value=block,
                limit=page_size,
            )
        return
    check_range("num_samples", spec.num_samples, 1, _MAX_SAMPLES)
    check_range("batch_size", spec.batch_size, 1, spec.num_samples)
    check_range("cfg_scale", spec.cfg_scale, 0.0, _MAX_SCALE)
    if spec.logprobs is not None:
        raise NotSupported(
            "a Monte Carlo estimate has no log probability of a single token",
            field="logprobs",
            value=spec.logprobs,
        )


def draw_masks(target_len: int, spec: ScoreSpec) -> NDArray[np.bool_]:
    """Return bool[S, T]: which target positions each sample masks.

    As ML-GSAI/LLaDA's `get_log_likelihood` draws them (arXiv:2502.09992, appendix A): in a stratum of b
    samples the numbers of masks are evenly spaced around the circle 1..T from a random start.
    """
    generator = np.random.Generator(np.random.Philox(key=spec.seed))
    masks = np.zeros((spec.num_samples, target_len), dtype=np.bool_)
    for first in range(0, spec.num_samples, spec.batch_size):
        size = min(spec.batch_size, spec.num_samples - first)
        start = int(generator.integers(1, target_len + 1))
        counts = np.linspace(start, start + (size - 1) * target_len / size, size).round().astype(np.int64)
        for offset, count in enumerate((counts - 1) % target_len + 1):
            masks[first + offset, generator.permutation(target_len)[:count]] = True
    return masks


class ScoringWork(ABC):
    """What both kinds of scoring have in common: rows that are fed once and read, in any order.

    max_tokens: of the rows of one step.
    """

    def __init__(self, spec: ScoreSpec, traits: ModelTraits, max_tokens: int) -> None:
        self.spec = spec
        self.traits = traits
        self.token_ids = np.asarray((*spec.prompt_ids, *spec.target_ids), dtype=np.int64)
        self.prompt_len = len(spec.prompt_ids)
        # Exact scores are those of what is served, which never chooses the mask; the estimate is the paper's.
        self.excluded_ids = () if spec.num_samples else (traits.mask_token_id,)
        self._max_tokens = max_tokens
        self._nfe = 0
        self._hit_len = 0

    @abstractmethod
    def fed(self, row: Row, pages: Sequence[int] | None) -> FedRow:
        """Return what a row feeds."""

    @abstractmethod
    def scored(self, row: Row) -> NDArray[np.int64]:
        """Return the positions that a row reads."""

    def usage(self) -> Usage:
        """Return what the request has cost so far."""
        return Usage(prompt_tokens=len(self.token_ids), cached_tokens=self._hit_len, nfe=self._nfe)

    def _score_row(self, request_id: str, start: int, end: int, *, sample: int, num_read: int) -> Row:
        cost = Cost(tokens=end - start, rows=1, logits_bytes=num_read * self.traits.vocab_size * _LOGIT_BYTES)
        return Row(request_id=request_id, kind=RowKind.SCORE, start=start, end=end, sample=sample, cost=cost)


class MonteCarloWork(ScoringWork):
    """Estimates a likelihood from S maskings of the target: rows over all N tokens, without pages.

    masks: bool[S, T]. The estimate is the mean over samples of the masked tokens' log probability divided by
    the masked share.
    """

    def __init__(
        self, spec: ScoreSpec, traits: ModelTraits, masks: NDArray[np.bool_], max_tokens: int
    ) -> None:
        super().__init__(spec, traits, max_tokens)
        self._masks = masks
        self._values: list[float] = []

    def standing(self, request_id: str) -> Standing:
        """Nothing is cached and no page is held: a row sees itself alone."""
        length = len(self.token_ids)
        return Standing(
            request_id=request_id,
            missing=None,
            denoise=self._rows(request_id),
            remaining=(len(self._masks) - len(self._values)) * length,
        )

    def _rows(self, request_id: str) -> tuple[Row, ...]:
        """Return the next samples, about as many tokens as a step takes."""
        length = len(self.token_ids)
        branches = ("cond", "uncond") if self.spec.cfg_scale else ("cond",)
        size = max(1, self._max_tokens // (length * len(branches)))
        rows = []
        for sample in range(len(self._values), min(len(self._values) + size, len(self._masks))):
            row = self._score_row(
                request_id, 0, length, sample=sample, num_read=int(self._masks[sample].sum())
            )
            rows += [_with_branch(row, branch) for branch in branches]
        return tuple(rows)

    def resume_at(self, cached_len: int) -> None:
        """Nothing is lost by a retraction."""

    def arrive(self, cached_len: int, nfe: int) -> None:
        """Nothing is cached, so nothing is asked of a peer."""
        raise EngineError("a Monte Carlo estimate has no keys that could arrive")

    def fed(self, row: Row, pages: Sequence[int] | None) -> FedRow:
        """Return a sample's tokens; without its condition, the prompt is masked too."""
        ids = self.token_ids.copy()
        ids[self.prompt_len :][self._masks[row.sample]] = self.traits.mask_token_id
        if row.branch == "uncond":
            ids[: self.prompt_len] = self.traits.mask_token_id
        return FedRow(row, ids, pages, self.spec.block_length)

    def scored(self, row: Row) -> NDArray[np.int64]:
        """Return the positions that a row reads."""
        return self.prompt_len + np.flatnonzero(self._masks[row.sample])

    def advance(self, results: list[RowResult]) -> Progress:
        """Add samples up; the last one ends the request."""
        self._nfe += 1
        for result in results:
            if result.scores is not None:
                share = self._masks[result.row.sample].mean()
                self._values.append(float(np.sum(result.scores.logprob, dtype=np.float64)) / float(share))
        if len(self._values) < len(self._masks):
            return Progress()
        values = np.asarray(self._values)
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        score = Score(log_likelihood=float(values.mean()), standard_error=error)
        return Progress(score=score, finish_reason=FinishReason.STOP)


class SequentialWork(ScoringWork):
    """Scores a target exactly as sequential decoding would draw it: left to right within each block.

    Each target token is read from a row of its block in which it and what follows are masked, behind the
    exact keys of the blocks before. The keys of such rows go to scratch slots behind the context.
    """

    def __init__(self, spec: ScoreSpec, traits: ModelTraits, page_size: int, max_tokens: int) -> None:
        super().__init__(spec, traits, max_tokens)
        self._page_size = page_size
        block, length = spec.block_length, len(self.token_ids)
        self._context_len = (length - 1) // block * block
        self._cached_len = 0
        self._positions = list(range(self.prompt_len, length))
        self._known = tuple(self.token_ids[: self._context_len].tolist())
        self._num_done = 0
        self._rows_at_once = max(1, min(len(self._positions), _SCRATCH_TOKENS // block))
        self._found: dict[int, TokenLogprob] = {}

    def standing(self, request_id: str) -> Standing:
        """Return what is missing in front of the last target, and the rows of the next target tokens."""
        block, is_missing = self.spec.block_length, self._cached_len < self._context_len
        num_left = len(self._positions) - self._num_done
        return Standing(
            request_id=request_id,
            missing=Missing(self._cached_len, self._context_len, block) if is_missing else None,
            denoise=self._rows(request_id),
            pages_to_progress=self._pages(self._context_len + block),
            pages_at_most=self.pages_at_most(),
            page_size=self._page_size,
            remaining=self._context_len - self._cached_len + num_left * block,
            known_tokens=self._known,
            cached_len=self._cached_len,
            # Keys and values depend on how the tokens are cut into blocks.
            cache_key=f"block{block}",
            block_length=block,
        )

    def _rows(self, request_id: str) -> tuple[Row, ...]:
        """Return the rows of the next target tokens."""
        block = self.spec.block_length
        size = max(1, min(self._rows_at_once, self._max_tokens // block))
        rows = []
        for place, position in enumerate(self._positions[self._num_done : self._num_done + size]):
            start = position // block * block
            row = self._score_row(request_id, start, start + block, sample=position, num_read=1)
            rows.append(_in_slots(row, slot=self._context_len + place * block, visible=start))
        return tuple(rows)

    def pages_at_most(self) -> int:
        """Return the pages of the context and of all rows of a step."""
        return self._pages(self._context_len + self._rows_at_once * self.spec.block_length)

    def _pages(self, num_slots: int) -> int:
        return -(-num_slots // self._page_size)

    def resume_at(self, cached_len: int) -> None:
        """Continue with this many cached positions; what was read stays."""
        self._cached_len = cached_len
        if not self._nfe:
            self._hit_len = cached_len

    def arrive(self, cached_len: int, nfe: int) -> None:
        """Take keys that a peer computed as present; its forwards count as the request's."""
        self._cached_len = max(cached_len, self._cached_len)
        self._nfe += nfe

    def fed(self, row: Row, pages: Sequence[int] | None) -> FedRow:
        """Return known tokens, or a block that is masked from the scored position on."""
        ids = np.full(row.end - row.start, self.traits.mask_token_id, dtype=np.int64)
        end = row.end if row.kind is RowKind.PREFILL else row.sample
        ids[: end - row.start] = self.token_ids[row.start : end]
        return FedRow(row, ids, pages, self.spec.block_length)

    def scored(self, row: Row) -> NDArray[np.int64]:
        """Return the one position that a row reads."""
        return np.asarray([row.sample])

    def advance(self, results: list[RowResult]) -> Progress:
        """Take keys or log probabilities; the last token ends the request."""
        self._nfe += 1
        for result in results:
            if result.row.kind is RowKind.PREFILL:
                self._cached_len = max(self._cached_len, result.row.end)
            elif result.scores is not None:
                self._num_done += 1
                self._found[result.row.sample] = _token(result.scores, self.spec.logprobs)
        if self._num_done < len(self._positions):
            return Progress()
        tokens = tuple(self._found[position] for position in self._positions)
        score = Score(
            log_likelihood=math.fsum(token.logprob for token in tokens),
            tokens=tokens if self.spec.logprobs is not None else (),
        )
        return Progress(score=score, finish_reason=FinishReason.STOP)


def _token(scores: Scores, width: int | None) -> TokenLogprob:
    logprob = float(scores.logprob[0])
    if not width or scores.top_ids is None:
        return TokenLogprob(logprob=logprob)
    return TokenLogprob(
        logprob=logprob,
        top_ids=tuple(scores.top_ids[0, :width].tolist()),
        top_logprobs=tuple(scores.top_logprobs[0, :width].tolist()),
    )


def _with_branch(row: Row, branch: str) -> Row:
    return msgspec.structs.replace(row, branch=branch)


def _in_slots(row: Row, *, slot: int, visible: int) -> Row:
    return msgspec.structs.replace(row, slot=slot, visible=visible)
