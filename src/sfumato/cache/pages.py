"""Pool and prefix tree together: what the scheduler asks when a request needs room."""

from __future__ import annotations

from sfumato.cache.pool import PageLease, PagePool
from sfumato.cache.radix import PrefixTree


class PageCache:
    """Leases pages, taking from the prefix tree what only it keeps; a prefix is shared by whole blocks."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.tree = PrefixTree(self.pool)

    @property
    def num_available(self) -> int:
        """Return how many pages are free or could be taken from the tree."""
        return self.pool.num_free + self.pool.num_cached

    def match(self, key: str, tokens: tuple[int, ...], block_length: int) -> list[int]:
        """Return the shared pages of the longest known prefix; changes nothing."""
        return self.tree.match(key, tokens, block_length)

    def admit(
        self,
        owner: str,
        shared: list[int],
        num_pages: int,
        *,
        key: str,
        tokens: tuple[int, ...],
        block_length: int,
    ) -> PageLease | None:
        """Lease shared and enough fresh pages for num_pages in all; None, and nothing changed, if too few."""
        lease = self.pool.lease(owner, shared)
        if not self.extend(lease, num_pages):
            self.pool.release(lease)
            return None
        if shared:
            self.tree.touch(key, tokens[: len(shared) * self.pool.page_size], block_length)
        return lease

    def extend(self, lease: PageLease, num_pages: int) -> bool:
        """Grow a lease to num_pages; False, and nothing changed, if there are too few."""
        missing = num_pages - len(lease.pages)
        if missing <= 0:
            return True
        short = missing - self.pool.num_free
        if short > 0 and (short > self.pool.num_cached or self.tree.evict(short) < short):
            return False
        self.pool.extend(lease, missing)
        return True

    def share(
        self,
        lease: PageLease,
        key: str,
        tokens: tuple[int, ...],
        block_length: int,
        *,
        may_replace: bool = True,
    ) -> None:
        """Enter committed whole blocks of a lease into the tree; copies of known blocks are given back.

        may_replace: if not, what stands behind such a copy is not entered yet.
        """
        self.tree.insert(key, tokens, block_length, lease, may_replace=may_replace)
