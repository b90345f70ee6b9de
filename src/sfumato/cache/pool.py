"""Pages and leases: every page is free, leased or cached, and the sum is constant."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from sfumato.errors import EngineError


class LeaseState(StrEnum):
    """Who may write to the pages of a lease.

    READY: this process alone. PENDING: a peer fills them. FAILED: a peer has stopped before it was through.
    DRAINING: nobody here wants them, but a peer has not said yet that it writes no more.
    """

    READY = "ready"
    PENDING = "pending"
    FAILED = "failed"
    DRAINING = "draining"


# From which state a lease may come into another.
_STEPS = {
    LeaseState.READY: {LeaseState.PENDING},
    LeaseState.PENDING: {LeaseState.READY, LeaseState.FAILED, LeaseState.DRAINING},
    LeaseState.DRAINING: {LeaseState.FAILED},
    LeaseState.FAILED: {LeaseState.READY},
}
_WRITTEN_BY_PEERS = {LeaseState.PENDING, LeaseState.DRAINING}


@dataclass(slots=True, eq=False)
class PageLease:
    """The pages that one request holds, in token order; the first `num_shared` came from the tree."""

    owner: str
    pages: list[int] = field(default_factory=list)
    num_shared: int = 0
    is_released: bool = False
    state: LeaseState = LeaseState.READY

    def become(self, state: LeaseState) -> None:
        """Enter a state. Raises EngineError where no way leads there."""
        if state not in _STEPS[self.state]:
            raise EngineError(f"the lease of {self.owner} is {self.state.value} and cannot be {state.value}")
        self.state = state


class PagePool:
    """Counts the leases of each page; a page that the prefix tree keeps and nobody leases is cached.

    page_size: tokens per page. Not thread-safe: one loop owns it.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._leases = [0] * num_pages
        self._is_kept = [False] * num_pages
        # One byte a page, so that a run of free ones is found by a search for bytes.
        self._is_free = bytearray(b"\x01" * num_pages)
        self._num_free = num_pages
        self._num_cached = 0

    @property
    def num_free(self) -> int:
        """Return how many pages nobody leases and the tree does not keep."""
        return self._num_free

    @property
    def num_cached(self) -> int:
        """Return how many pages only the tree keeps."""
        return self._num_cached

    @property
    def num_leased(self) -> int:
        """Return how many pages at least one request holds."""
        return self.num_pages - self.num_free - self.num_cached

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages hold num_tokens."""
        return -(-num_tokens // self.page_size)

    def lease(self, owner: str, shared: list[int] | None = None) -> PageLease:
        """Start a lease on pages that the tree keeps; take further ones with `extend`."""
        lease = PageLease(owner=owner)
        for page in shared or []:
            if not self._is_kept[page] and not self._leases[page]:
                raise EngineError(f"page {page} is free and cannot be shared with {owner}")
            if not self._leases[page]:
                self._num_cached -= 1
            self._leases[page] += 1
            lease.pages.append(page)
        lease.num_shared = len(lease.pages)
        return lease

    def extend(self, lease: PageLease, num_pages: int) -> None:
        """Add free pages to a lease. Raises EngineError if there are too few; ask `num_free` first."""
        if lease.is_released:
            raise EngineError(f"the lease of {lease.owner} was released already")
        if num_pages > self._num_free:
            raise EngineError(f"{lease.owner} wants {num_pages} pages, {self._num_free} are free")
        while num_pages:
            first, count = self._run(lease, num_pages)
            pages = range(first, first + count)
            self._is_free[first : first + count] = bytes(count)
            for page in pages:
                self._leases[page] = 1
            lease.pages += pages
            self._num_free -= count
            num_pages -= count

    def _run(self, lease: PageLease, num_pages: int) -> tuple[int, int]:
        """Return the first of consecutive free pages, and how many: those together are read without a copy.

        Behind what the lease holds, if possible; else where there is as much room before and behind, so that
        it and its neighbour can grow; low places first, so that little memory is touched.
        """
        free = self._is_free
        if lease.pages:
            first = lease.pages[-1] + 1
            stop = free.find(0, first, first + num_pages)
            count = (min(first + num_pages, self.num_pages) if stop < 0 else stop) - first
            if count > 0:
                return first, count
        at = free.find(b"\x01" * (3 * num_pages))
        if at >= 0:
            return (at + num_pages if at else 0), num_pages
        count = num_pages
        while (at := free.find(b"\x01" * count)) < 0:
            count = -(-count // 2)
        return at, count

    def release(self, lease: PageLease) -> None:
        """Give every page of a lease back. Raises EngineError on a second call."""
        if lease.is_released:
            raise EngineError(f"double free: the lease of {lease.owner} was released already")
        if lease.state in _WRITTEN_BY_PEERS:
            raise EngineError(f"the lease of {lease.owner} is {lease.state.value}: a peer may write to it")
        lease.is_released = True
        for page in reversed(lease.pages):
            self._return(page)
        lease.pages = []

    def replace(self, lease: PageLease, index: int, page: int) -> None:
        """Put a page that the tree keeps in place of a lease's own copy of the same block.

        Only between launches: no forward in flight may still read the page that is given back.
        """
        if not self._is_kept[page]:
            raise EngineError(f"page {page} is not in the prefix tree and cannot replace another")
        own = lease.pages[index]
        if not self._leases[page]:
            self._num_cached -= 1
        self._leases[page] += 1
        lease.pages[index] = page
        self._return(own)

    def _return(self, page: int) -> None:
        """Take one lease off a page."""
        self._leases[page] -= 1
        if self._leases[page] < 0:
            raise EngineError(f"double free: page {page} had no lease")
        if not self._leases[page]:
            if self._is_kept[page]:
                self._num_cached += 1
            else:
                self._set_free(page)

    def _set_free(self, page: int) -> None:
        if self._is_free[page]:
            raise EngineError(f"page {page} is free twice")
        self._is_free[page] = 1
        self._num_free += 1

    def keep(self, page: int) -> None:
        """Note that the prefix tree holds this leased page."""
        if self._is_kept[page] or not self._leases[page]:
            raise EngineError(f"page {page} cannot enter the prefix tree")
        self._is_kept[page] = True

    def drop(self, page: int) -> None:
        """Note that the prefix tree has let go of this page."""
        if not self._is_kept[page]:
            raise EngineError(f"page {page} is not in the prefix tree")
        self._is_kept[page] = False
        if not self._leases[page]:
            self._num_cached -= 1
            self._set_free(page)

    def is_leased(self, page: int) -> bool:
        """Return whether a request holds this page."""
        return self._leases[page] > 0

    def check(self) -> None:
        """Recount everything. Raises EngineError where a count is off."""
        cached = sum(kept and not count for kept, count in zip(self._is_kept, self._leases, strict=True))
        leased = sum(count > 0 for count in self._leases)
        free = self._num_free
        if self._is_free.count(1) != free:
            raise EngineError(f"{self._is_free.count(1)} pages are marked as free, {free} were counted")
        if any(
            is_free and (self._leases[page] or self._is_kept[page])
            for page, is_free in enumerate(self._is_free)
        ):
            raise EngineError("a page is free and in use")
        if cached != self._num_cached or free + leased + cached != self.num_pages:
            raise EngineError(f"free {free} + leased {leased} + cached {cached} != {self.num_pages} pages")
