"""The work of prefilling for a peer: keys and values of known tokens, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sfumato.core.messages import Usage
from sfumato.core.plan import Cost, Row, RowKind, RowResult
from sfumato.core.request import Progress
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

    def phase(self) -> RowKind:
        """Return PREFILL until all keys are there; what comes then is the peer's."""
        return RowKind.PREFILL if self._cached_len < len(self._known) else RowKind.DENOISE

    def rows(self, request_id: str, max_tokens: int) -> tuple[Row, ...]:
        """Return the next whole blocks, about max_tokens, one block at least."""
        size, start = self.block_length, self._cached_len
        end = min(len(self._known), start + max(size, max_tokens // size * size))
        cost = Cost(tokens=end - start, rows=1)
        kind = RowKind.PREFILL
        return (Row(request_id=request_id, kind=kind, start=start, end=end, slot=start, cost=cost),)

    def pages_for(self, rows: tuple[Row, ...]) -> int:
        """Return the pages up to the last position that is written."""
        return max(row.end for row in rows) // self._page_size

    def pages_to_progress(self) -> int:
        """Return all pages: a prompt that does not fit beside the others waits."""
        return self.pages_at_most()

    def pages_at_most(self) -> int:
        """Return the pages of all known tokens."""
        return len(self._known) // self._page_size

    def remaining(self) -> int:
        """Return the tokens without keys."""
        return len(self._known) - self._cached_len

    def known_tokens(self) -> tuple[int, ...]:
        """Return all tokens."""
        return self._known

    def cache_key(self) -> str:
        """Keys and values depend on how the tokens are cut into blocks."""
        return f"block{self._block_length}" if self.traits.context_granularity != 1 else "causal"

    @property
    def block_length(self) -> int:
        """Return how many tokens are cached, and shared, together."""
        return self._page_size if self.traits.context_granularity == 1 else self._block_length

    def resume_at(self, cached_len: int) -> None:
        """Continue with this many cached positions."""
        self._cached_len = cached_len

    def cached_len(self) -> int:
        """Return how many leading positions have keys."""
        return self._cached_len

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
    if work.pages_at_most() > num_pages:
        raise RequestError(
            f"the prompt needs {work.pages_at_most()} KV pages, the prefill engine has {num_pages}",
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
