"""Where pages lie: those of a request together, so that its keys are read where they are."""

from __future__ import annotations

import random
from itertools import pairwise

from sfumato.cache.pool import PageLease, PagePool


def num_runs(lease: PageLease) -> int:
    """Return in how many runs of consecutive pages a lease lies."""
    return 1 + sum(after != page + 1 for page, after in pairwise(lease.pages))


def test_requests_that_grow_in_turn_stay_together() -> None:
    pool = PagePool(200, 4)
    leases = [pool.lease(str(number)) for number in range(8)]
    for lease in leases:
        pool.extend(lease, 5)
    for _ in range(4):
        for lease in leases:
            pool.extend(lease, 1)
    assert [num_runs(lease) for lease in leases] == [1] * 8
    pool.check()
    # Low places first: the memory that is touched stays near what is needed.
    assert max(page for lease in leases for page in lease.pages) < 8 * 5 * 2 + 5


def test_a_full_pool_gives_what_it_has() -> None:
    pool = PagePool(12, 4)
    ends = [pool.lease(str(number)) for number in range(6)]
    for lease in ends:
        pool.extend(lease, 2)
    for lease in ends[::2]:
        pool.release(lease)
    wide = pool.lease("wide")
    pool.extend(wide, 6)
    assert sorted(wide.pages) == sorted({*range(12)} - {page for lease in ends for page in lease.pages})
    assert pool.num_free == 0
    pool.check()


def test_what_follows_a_shared_beginning_lies_together() -> None:
    pool = PagePool(64, 4)
    first = pool.lease("first")
    pool.extend(first, 4)
    for page in first.pages:
        pool.keep(page)
    shared = list(first.pages)
    pool.release(first)
    leases = [pool.lease(str(number), shared) for number in range(3)]
    for lease in leases:
        pool.extend(lease, 3)
    for _ in range(3):
        for lease in leases:
            pool.extend(lease, 1)
    assert max(num_runs(lease) for lease in leases) == 2
    pool.check()


def test_random_histories_lose_no_page() -> None:
    rng = random.Random(0)
    pool = PagePool(40, 4)
    held: list[PageLease] = []
    for step in range(2000):
        if held and rng.random() < 0.4:
            pool.release(held.pop(rng.randrange(len(held))))
        elif held and rng.random() < 0.5 and pool.num_free:
            pool.extend(rng.choice(held), rng.randrange(1, 1 + min(3, pool.num_free)))
        elif pool.num_free:
            lease = pool.lease(str(step))
            pool.extend(lease, rng.randrange(1, 1 + min(9, pool.num_free)))
            held.append(lease)
        pool.check()
        pages = [page for lease in held for page in lease.pages]
        assert len(pages) == len(set(pages)) == pool.num_leased
