"""The prefix tree: whole blocks only, least recently used leaves go first, pages add up."""

from __future__ import annotations

import random

import pytest

from sfumato.cache.pages import PageCache
from sfumato.cache.pool import PagePool
from sfumato.errors import EngineError


def admitted(pages: PageCache, owner: str, tokens: tuple[int, ...], extra: int = 0):  # type: ignore[no-untyped-def]
    """Lease pages for tokens in blocks of 4 and one page per block."""
    shared = pages.match("k", tokens, 4)
    return pages.admit(owner, shared, len(tokens) // 4 + extra, key="k", tokens=tokens, block_length=4)


def test_a_prefix_is_shared_by_whole_blocks() -> None:
    pages = PageCache(8, 4)
    lease = admitted(pages, "a", (1, 2, 3, 4, 5, 6, 7, 8))
    pages.share(lease, "k", (1, 2, 3, 4, 5, 6, 7, 8), 4)
    assert pages.match("k", (1, 2, 3, 4, 5, 6, 7, 9), 4) == lease.pages[:1]
    assert pages.match("k", (1, 2, 3, 4, 5, 6, 7), 4) == lease.pages[:1]
    assert pages.match("other", (1, 2, 3, 4), 4) == []
    pages.pool.release(lease)
    assert (pages.pool.num_free, pages.pool.num_cached) == (6, 2)


def test_the_least_recently_used_leaf_goes_first() -> None:
    pages = PageCache(4, 4)
    for start in (0, 10, 20):
        tokens = tuple(range(start, start + 4))
        lease = admitted(pages, str(start), tokens)
        pages.share(lease, "k", tokens, 4)
        pages.pool.release(lease)
    again = admitted(pages, "again", (0, 1, 2, 3))
    pages.pool.release(again)
    big = admitted(pages, "big", (), extra=2)
    assert big is not None
    assert pages.match("k", (0, 1, 2, 3), 4)
    assert not pages.match("k", (10, 11, 12, 13), 4)
    assert pages.match("k", (20, 21, 22, 23), 4)
    pages.pool.check()


def test_leased_blocks_are_not_evicted() -> None:
    pages = PageCache(3, 4)
    lease = admitted(pages, "a", (1, 2, 3, 4))
    pages.share(lease, "k", (1, 2, 3, 4), 4)
    assert admitted(pages, "b", (), extra=3) is None
    pages.pool.check()
    assert pages.match("k", (1, 2, 3, 4), 4) == lease.pages


def test_a_copy_of_a_known_block_is_given_back() -> None:
    pages = PageCache(4, 4)
    first, second = pages.pool.lease("a"), pages.pool.lease("b")
    for lease in (first, second):
        assert pages.extend(lease, 1)
        pages.share(lease, "k", (1, 2, 3, 4), 4)
    assert second.pages == first.pages == pages.match("k", (1, 2, 3, 4), 4)
    assert pages.pool.num_free == 3
    pages.pool.release(second)
    pages.pool.release(first)
    assert pages.pool.num_cached == 1
    pages.pool.check()


def test_every_cached_page_can_be_evicted() -> None:
    pages = PageCache(6, 4)
    first, second = pages.pool.lease("a"), pages.pool.lease("b")
    for lease in (first, second):
        assert pages.extend(lease, 2)
    pages.share(first, "k", (1, 2, 3, 4), 4)
    pages.share(second, "k", (1, 2, 3, 4, 5, 6, 7, 8), 4)
    pages.pool.release(first)
    # The block that both computed is leased by the second now, with the one behind it.
    assert pages.pool.num_cached == 0
    pages.pool.release(second)
    big = pages.pool.lease("big")
    assert pages.num_available == 6
    assert pages.extend(big, 6)
    pages.pool.check()


def test_random_histories_keep_the_sum() -> None:
    rng = random.Random(1)
    pages = PageCache(12, 4)
    held = []
    for index in range(4000):
        if held and rng.random() < 0.5:
            pages.pool.release(held.pop(rng.randrange(len(held))))
        else:
            tokens = tuple(rng.choice([1, 2]) for _ in range(4 * rng.randrange(1, 5)))
            lease = admitted(pages, str(index), tokens)
            if lease is not None:
                pages.share(lease, "k", tokens, 4)
                held.append(lease)
        pages.pool.check()
    assert len(pages.tree._leaves) < 2000


def test_misuse_raises() -> None:
    pool = PagePool(2, 4)
    lease = pool.lease("a")
    with pytest.raises(EngineError, match="2 are free"):
        pool.extend(lease, 3)
    with pytest.raises(EngineError, match="cannot be shared"):
        pool.lease("b", [0])
    with pytest.raises(EngineError, match="not in the prefix tree"):
        pool.drop(0)
    pool.extend(lease, 1)
    pool.release(lease)
    with pytest.raises(EngineError, match="released already"):
        pool.extend(lease, 1)
