"""Which replica a request suits: prefixes against load, groups of images, what others have sent."""

from __future__ import annotations

import pickle
import random
from collections import Counter

from sfumato.deploy.placing import Placing
from sfumato.deploy.ticket import Front, Hints, Ticket
from sfumato.engine.routing import UNIT, chain_of

NAMES = ["a", "b", "c", "d"]
PROMPT = tuple(range(8 * UNIT))


def placing() -> Placing:
    made = Placing(random.Random(0))
    made.keep(NAMES)
    return made


def text(prompt: tuple[int, ...] = PROMPT, cost: float = 32.0, **others: object) -> Hints:
    return Hints(cost=cost, num_prompt_tokens=len(prompt), chain=chain_of(prompt), **others)  # type: ignore[arg-type]


def unknown(name: str) -> None:
    return None


def test_a_known_prefix_goes_where_it_was() -> None:
    router = placing()
    router.place("r0", text(), "c")
    router.end("r0")
    for number in range(20):
        longer = text((*PROMPT, *range(number)))
        assert router.choose(longer, NAMES, unknown)[0] == ["c"]


def test_the_longest_prefix_wins() -> None:
    router = placing()
    router.place("r0", text(PROMPT[: 4 * UNIT]), "a")
    router.place("r1", text(), "b")
    router.end("r0")
    router.end("r1")
    assert router.choose(text(), NAMES, unknown)[0] == ["b"]


def test_a_load_outweighs_a_prefix() -> None:
    router = placing()
    for number in range(3):
        router.place(f"r{number}", text(cost=500.0), "c")
    assert router.choose(text(), NAMES, unknown)[0] != ["c"]


def test_equals_are_two_of_which_the_queue_decides() -> None:
    router = placing()
    seen: Counter[str] = Counter()
    for _ in range(200):
        first = router.choose(text(()), NAMES, unknown)[0]
        assert len(first) == 2
        seen.update(first)
    assert set(seen) == set(NAMES)


def test_what_other_fronts_have_sent_counts() -> None:
    router = placing()
    router.place("r0", text(), "a")
    router.end("r0")
    first = router.choose(text(), NAMES, lambda name: 9 if name == "a" else 0)[0]
    assert "a" not in first


def test_what_shall_be_avoided_is_not_chosen_unless_it_is_all_there_is() -> None:
    router = placing()
    router.place("r0", text(), "c")
    ranks = router.choose(text(avoid=frozenset("c")), NAMES, unknown)
    assert all("c" not in rank for rank in ranks)
    assert router.choose(text(avoid=frozenset("c")), ["c"], unknown)[0] == ["c"]


def test_pictures_of_one_size_share_forwards() -> None:
    router = placing()
    square, wide = Hints(cost=8, group="64x64x1"), Hints(cost=8, group="64x128x1")
    router.place("r0", square, "a")
    router.place("r1", wide, "b")
    # A second one joins it; a third finds that load outweighs what is saved.
    router.place("r2", Hints(cost=6), "c")
    router.place("r3", Hints(cost=6), "d")
    assert router.choose(square, NAMES, unknown)[0] == ["a"]
    assert router.choose(wide, NAMES, unknown)[0] == ["b"]


def test_every_replica_is_in_some_rank_once() -> None:
    router = placing()
    router.place("r0", text(), "c")
    found = [name for rank in router.choose(text(), NAMES, unknown) for name in rank]
    assert sorted(found) == NAMES


def test_one_that_has_gone_takes_its_load_along() -> None:
    router = placing()
    router.place("r0", text(), "c")
    router.keep(["a", "b"])
    router.end("r0")
    assert router.choose(text(), ["a", "b"], unknown)[0] in (["a", "b"], ["b", "a"])


def test_a_ticket_travels_without_its_hints() -> None:
    ticket = Ticket("t", Front("tcp://127.0.0.1:1", b"key"), text())
    copy = pickle.loads(pickle.dumps(ticket))
    assert copy == ticket
    assert copy.hints == Hints()
