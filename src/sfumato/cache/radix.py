"""The prefix tree of committed whole blocks: same tokens in the same blocks, same keys and values."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from sfumato.cache.pool import PageLease, PagePool

# Stale heap entries that are tolerated before the heap is rebuilt.
_SLACK = 256


@dataclass(slots=True, eq=False)
class _Node:
    """One block: its pages, its children by their tokens, and when it was last used."""

    parent: _Node | None
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    last_used: int = 0
    offered_at: int = -1
    is_dropped: bool = False


class PrefixTree:
    """One root per cache key (model, block length, dtype); every edge is one whole block.

    Never holds a partial block or an open position: `insert` is given committed blocks only. Keeps pages
    through the pool, and lets the least recently used leaves go when `evict` asks for room.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._roots: dict[str, _Node] = {}
        self._clock = 0
        # (last_used, tie-breaker, node); entries go stale and are checked when they are popped.
        self._leaves: list[tuple[int, int, _Node]] = []
        self._serial = 0
        self._num_nodes = 0

    def match(self, key: str, tokens: tuple[int, ...], block_length: int) -> list[int]:
        """Return the pages of the longest known prefix of whole blocks; changes nothing."""
        pages: list[int] = []
        node = self._roots.get(key)
        for start in range(0, len(tokens) - block_length + 1, block_length):
            node = node.children.get(tokens[start : start + block_length]) if node else None
            if node is None:
                break
            pages.extend(node.pages)
        return pages

    def insert(
        self,
        key: str,
        tokens: tuple[int, ...],
        block_length: int,
        lease: PageLease,
        *,
        may_replace: bool = True,
    ) -> None:
        """Keep the pages of a lease's committed blocks.

        tokens: whole blocks from position 0. A block that is known already keeps its first pages, and the
        lease takes them in place of its own: whoever leases a block so leases all blocks before it, and every
        page that only the tree keeps can be evicted. may_replace: if not, the first such block ends it.
        """
        self._clock += 1
        per_block = block_length // self._pool.page_size
        node = self._roots.setdefault(key, _Node(parent=None, tokens=(), pages=()))
        for index in range(len(tokens) // block_length):
            block = tokens[index * block_length : (index + 1) * block_length]
            first = index * per_block
            child = node.children.get(block)
            if child is None:
                held = tuple(lease.pages[first : first + per_block])
                child = _Node(parent=node, tokens=block, pages=held)
                node.children[block] = child
                self._num_nodes += 1
                for page in held:
                    self._pool.keep(page)
            held = tuple(lease.pages[first : first + per_block])
            if held != child.pages and not may_replace:
                break
            for offset, page in enumerate(child.pages):
                if lease.pages[first + offset] != page:
                    self._pool.replace(lease, first + offset, page)
            child.last_used = self._clock
            node = child
        self._offer(node)

    def touch(self, key: str, tokens: tuple[int, ...], block_length: int) -> None:
        """Mark a matched prefix as used now."""
        self._clock += 1
        node = self._roots.get(key)
        for start in range(0, len(tokens) - block_length + 1, block_length):
            node = node.children.get(tokens[start : start + block_length]) if node else None
            if node is None:
                return
            node.last_used = self._clock
            self._offer(node)

    def evict(self, num_pages: int) -> int:
        """Free at least num_pages cached pages if there are so many; return how many were freed."""
        freed = 0
        held_back: list[tuple[int, int, _Node]] = []
        while freed < num_pages and self._leaves:
            entry = heapq.heappop(self._leaves)
            last_used, _, node = entry
            node.offered_at = -1
            if node.is_dropped or node.children or node.parent is None:
                continue
            if last_used != node.last_used:
                self._offer(node)
                continue
            if any(self._pool.is_leased(page) for page in node.pages):
                node.offered_at = node.last_used
                held_back.append(entry)
                continue
            freed += len(node.pages)
            self._drop(node)
        for entry in held_back:
            heapq.heappush(self._leaves, entry)
        return freed

    def _drop(self, node: _Node) -> None:
        for page in node.pages:
            self._pool.drop(page)
        node.is_dropped = True
        self._num_nodes -= 1
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens]
        parent.offered_at = -1
        self._offer(parent)

    def _offer(self, node: _Node) -> None:
        if node.parent is None or node.children or node.offered_at == node.last_used:
            return
        node.offered_at = node.last_used
        self._serial += 1
        heapq.heappush(self._leaves, (node.last_used, self._serial, node))
        if len(self._leaves) > 2 * self._num_nodes + _SLACK:
            self._leaves = [entry for entry in self._leaves if _is_current(entry)]
            heapq.heapify(self._leaves)


def _is_current(entry: tuple[int, int, _Node]) -> bool:
    last_used, _, node = entry
    return last_used == node.last_used and not node.children and not node.is_dropped
