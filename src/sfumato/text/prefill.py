"""The work of prefilling for a peer: keys and values of known tokens, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sfumato.core.messages import Usage
from sfumato.core.plan import Row, RowResult
from sfumato.core.request import Missing, Progress, Standing
from sfumato.core.traits import ModelTraits
from sfumato.errors import NotSupported, RequestError
from sfumato.text.batching import FedRow
from sfumato.text.checks import check_tokens


class PrefillWork:
    """Implements the work protocol over tokens whose keys a peer waits for; it never denoises.

    known_ids: whole blocks (pages, where the context is cached token by token) from position 0.
    """

    def __init__(
        self, known_ids: tuple[int, ...], traits: ModelTraits, *, block_length: int, page_size: int
    ) -> None:
        self.traits = traits
        self.token_ids = np.asarray(known_ids, dtype=np.int64)
        self._known = known_ids
        self._block_length = block_length
        self._page_size = page_size
        self._cached_len = 0
        self.nfe = 0

    def standing(self, request_id: str) -> Standing:
        """Return where it stands: with all keys there nothing follows, for what comes then is the peer's."""
        end, is_causal = len(self._known), self.traits.context_granularity == 1
        unit = self._page_size if is_causal else self._block_length
        num_pages = end // self._page_size
        return Standing(
            request_id=request_id,
            missing=Missing(self._cached_len, end, unit) if self._cached_len < end else None,
            denoise=(),
            # All pages: a prompt that does not fit beside the others waits.
            pages_to_progress=num_pages,
            pages_at_most=num_pages,
            page_size=self._page_size,
            remaining=end - self._cached_len,
            known_tokens=self._known,
            cached_len=self._cached_len,
            cache_key="causal" if is_causal else f"block{self._block_length}",
            block_length=unit,
        )

    def resume_at(self, cached_len: int) -> None:
        """Continue with this many cached positions."""
        self._cached_len = cached_len

    def arrive(self, cached_len: int, nfe: int) -> None:
        """Take keys of yet another peer as present."""
        self._cached_len = max(cached_len, self._cached_len)
        self.nfe += nfe

    def fed(self, row: Row, pages: Sequence[int] | None) -> FedRow:
        """Return the tokens that a row feeds."""
        return FedRow(row, self.token_ids[row.start : row.end], pages, self._block_length)

    def advance(self, results: list[RowResult]) -> Progress:
        """Count what has run; that all of it has is seen by whoever sends it."""
        self.nfe += 1
        for result in results:
            self._cached_len = max(self._cached_len, result.row.end)
        return Progress()

    def usage(self) -> Usage:
        """Return what the peer's request has cost here."""
        return Usage(prompt_tokens=len(self._known), nfe=self.nfe)


def make_prefill(
    known_ids: tuple[int, ...],
    traits: ModelTraits,
    *,
    block_length: int,
    page_size: int,
    num_pages: int,
) -> PrefillWork:
    """Check what a peer asks for and build its work. Raises RequestError."""
    if not traits.has_exact_cache:
        raise NotSupported(bidirectional_reason(traits), field="model", value=traits.family)
    size = page_size if traits.context_granularity == 1 else block_length
    check_tokens("prompt", known_ids, traits.vocab_size)
    if size < 1 or size % page_size or len(known_ids) % size or not known_ids:
        raise RequestError(
            f"{len(known_ids)} tokens in blocks of {size} are not whole pages of {page_size}",
            field="block_length",
            value=block_length,
            limit=page_size,
        )
    work = PrefillWork(known_ids, traits, block_length=block_length, page_size=page_size)
    if len(known_ids) // page_size > num_pages:
        raise RequestError(
            f"the prompt needs {len(known_ids) // page_size} KV pages, the prefill engine has {num_pages}",
            field="prompt",
            value=len(known_ids),
            limit=num_pages * page_size,
        )
    return work


def bidirectional_reason(traits: ModelTraits) -> str:
    """Say why a model's prefill cannot be done elsewhere."""
    return (
        f"the family {traits.family} attends in both directions: the keys and values of a prompt change with "
        f"every step behind it, so a prefill has nothing exact to hand over (0 bytes of KV)"
    )
