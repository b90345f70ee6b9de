"""Which replica takes a request."""

from __future__ import annotations

import pytest

from sfumato.engine.routing import Router

PROMPT = list(range(256))


def test_equals_take_turns() -> None:
    router = Router(3, shares_prefixes=True)
    assert [router.choose(f"r{number}", [number] * 40, 10) for number in range(6)] == [0, 1, 2, 0, 1, 2]


def test_a_known_prefix_goes_where_it_was() -> None:
    router = Router(2, shares_prefixes=True)
    first = router.choose("a", PROMPT, 8)
    router.end("a")
    for number in range(5):
        assert router.choose(f"b{number}", [*PROMPT, number], 8) == first
        router.end(f"b{number}")


def test_a_long_queue_outweighs_a_prefix() -> None:
    router = Router(2, shares_prefixes=True)
    first = router.choose("a", PROMPT, 8)
    router.choose("long", list(range(1000, 1040)), 10)
    router.end("a")
    router.end("long")
    assert router.choose("busy", [*PROMPT, 1], 500) == first
    assert router.choose("b", [*PROMPT, 2], 8) != first


def test_without_shared_prefixes_only_load_counts() -> None:
    router = Router(2, shares_prefixes=False)
    router.choose("a", PROMPT, 8)
    router.end("a")
    assert router.choose("b", PROMPT, 8) == 1


def test_the_load_goes_back_to_nothing() -> None:
    router = Router(2, shares_prefixes=True)
    for number in range(10):
        router.choose(f"r{number}", PROMPT[: 20 * number], 5 + number)
    assert router.load(0) > 0
    for number in range(10):
        router.end(f"r{number}")
        router.end(f"r{number}")
    assert router.load(0) == pytest.approx(0)
    assert router.load(1) == pytest.approx(0)


def test_the_least_busy_one_gets_short_requests_while_the_other_has_a_long_one() -> None:
    router = Router(2, shares_prefixes=True)
    assert router.choose("long", [1], 1000) == 0
    assert [router.choose(f"r{number}", [2], 100) for number in range(9)] == [1] * 9


def test_a_lost_replica_gets_nothing() -> None:
    router = Router(2, shares_prefixes=True)
    router.choose("a", PROMPT, 8)
    router.lose(0)
    assert [router.choose(f"r{number}", PROMPT, 8) for number in range(3)] == [1, 1, 1]
    router.lose(1)
    with pytest.raises(LookupError):
        router.choose("b", PROMPT, 8)
