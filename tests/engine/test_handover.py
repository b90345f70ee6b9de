"""Situations 39 to 41, and 20, 22, 34 across a hand-over: in-process links, the table-driven model."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from sfumato.cache.pool import LeaseState, PagePool
from sfumato.core.handover import (
    Ask,
    Blocks,
    Done,
    Drained,
    Failed,
    LinkHeard,
    LinkSilent,
    PeerEvent,
    Received,
    RequestState,
)
from sfumato.core.messages import FinishReason
from sfumato.core.request import Status
from sfumato.engine.limits import Limits
from sfumato.errors import EngineError
from tests.fakes import PREFILL, Harness, rows, solo
from tests.handover_fakes import LAYOUT, TIMEOUT, HeldLink, Pools, UnreliableLink

PROMPTS = {"a": 33, "b": 6, "c": 3, "d": 17, "e": 40}


@pytest.fixture(params=[0, 1], ids=["depth0", "depth1"])
def pools(request: pytest.FixtureRequest) -> Iterator[Pools]:
    made = Pools(link=HeldLink, depth=request.param)
    yield made
    made.close()


def submit(engine: Harness, name: str, length: int) -> None:
    engine.submit(name, length, max_tokens=9)


def expected(length: int, name: str) -> list[int]:
    return solo(Harness(), lambda alone: submit(alone, name, length))


def held(pools: Pools) -> HeldLink:
    """Return the prefill engine's link to the denoise engine."""
    link = pools.links[0][1]
    assert isinstance(link, HeldLink)
    return link


def asking(pools: Pools) -> HeldLink:
    """Return the denoise engine's link to the prefill engine."""
    link = pools.links[0][0]
    assert isinstance(link, HeldLink)
    return link


def prefill_rows(engine: Harness) -> list[tuple[str, int, int]]:
    return [
        entry
        for plan in engine.plans
        for entries in rows(plan).values()
        for entry in entries
        if entry[0] == PREFILL
    ]


def test_prompts_are_prefilled_by_the_peer_and_tokens_equal_solo(pools: Pools) -> None:
    for name, length in PROMPTS.items():
        submit(pools.denoise, name, length)
    pools.run()
    for name, length in PROMPTS.items():
        assert pools.denoise.tokens[name] == expected(length, name), name
        assert pools.denoise.ended[name].finish_reason is FinishReason.LENGTH
    assert prefill_rows(pools.denoise) == []
    assert all(plan.kind == "prefill" for plan in pools.prefill.plans)
    # Whole blocks only, and a prompt without one asks for nothing.
    assert all(end % 4 == 0 for _, _, end in prefill_rows(pools.prefill))
    counts = pools.denoise.peers.fetching.counts
    assert (counts.asked, counts.arrived, counts.failed) == (4, 4, 0)
    assert counts.tokens == 32 + 4 + 16 + 40
    assert pools.prefill.outputs == []
    assert pools.prefill.peers.filling.counts.received == 4
    pools.check_nothing_is_left()


def test_blocks_travel_while_later_ones_are_still_being_prefilled() -> None:
    pools = Pools(prefill_limits=Limits(max_prefill_tokens=8), link=HeldLink)
    submit(pools.denoise, "a", 41)
    pools.run_until(lambda: pools.denoise.peers.fetching.counts.tokens > 0)
    assert 0 < pools.denoise.loop.live["a"].standing.cached_len < 40
    assert pools.denoise.loop.live["a"].status is Status.AWAY
    assert pools.prefill.loop.live
    pools.run()
    assert pools.denoise.tokens["a"] == expected(41, "a")
    # The peer's forwards count as the request's.
    assert pools.denoise.ended["a"].usage.nfe == 5 + pools.denoise.ended["a"].usage.denoise_steps
    pools.close()


def test_what_the_receiver_has_is_not_sent(pools: Pools) -> None:
    prompt = [1 + index % 50 for index in range(24)]
    pools.denoise.submit("first", prompt, max_tokens=4)
    pools.run()
    before = pools.denoise.peers.fetching.counts.tokens
    pools.denoise.submit("second", [*prompt, *range(1, 10)], max_tokens=4)
    pools.run()
    assert pools.denoise.peers.fetching.counts.tokens - before == 32 - 24
    asked = pools.denoise.peers.fetching.counts.asked
    pools.denoise.submit("third", prompt, max_tokens=4)
    pools.run()
    assert pools.denoise.peers.fetching.counts.asked == asked
    pools.check_nothing_is_left()


def test_no_peer_means_prefilling_here() -> None:
    pools = Pools(num_prefill=0)
    submit(pools.denoise, "a", 33)
    pools.run()
    assert pools.denoise.tokens["a"] == expected(33, "a")
    assert prefill_rows(pools.denoise)
    pools.close()


def test_requests_are_shared_out_among_peers() -> None:
    pools = Pools(num_prefill=2)
    for index in range(6):
        submit(pools.denoise, f"r{index}", 20 + index)
    pools.run()
    assert [prefill.peers.filling.counts.asked for prefill in pools.prefills] == [3, 3]
    for index in range(6):
        assert pools.denoise.tokens[f"r{index}"] == expected(20 + index, f"r{index}")
    pools.check_nothing_is_left()
    pools.close()


def test_denoising_goes_on_while_a_prompt_is_away(pools: Pools) -> None:
    submit(pools.denoise, "c", 3)
    held(pools).is_holding = True
    submit(pools.denoise, "a", 33)
    pools.run_until(lambda: "c" in pools.denoise.ended)
    assert pools.denoise.loop.live["a"].status is Status.AWAY
    # Nothing can run: the loop sleeps until a peer says something, or is late.
    assert pools.denoise.loop.may_wait() == pytest.approx(TIMEOUT)
    held(pools).release()
    pools.run()
    assert pools.denoise.tokens["a"] == expected(33, "a")


# 39


def test_an_arrival_is_acknowledged_once_with_no_forward(pools: Pools) -> None:
    submit(pools.denoise, "a", 33)
    pools.run_until(lambda: pools.prefill.peers.filling.counts.sent == 1)
    pools.denoise.loop.is_paused = True
    for _ in range(5):
        pools.step()
    assert pools.denoise.plans == []
    assert pools.prefill.peers.filling.counts.received == 1
    assert pools.prefill.peers.filling.num_unacknowledged == 0
    pools.denoise.loop.is_paused = False
    pools.run()
    assert pools.prefill.peers.filling.counts.received == 1
    assert pools.prefill.peers.filling.counts.refused == 0


@pytest.mark.parametrize("way", ["abort", "timeout"])
def test_an_arrival_that_ends_at_once_is_acknowledged_once(pools: Pools, way: str) -> None:
    held(pools).is_holding = True
    pools.denoise.submit("a", 33, timeout=5.0)
    pools.run_until(lambda: pools.prefill.peers.filling.counts.sent == 1)
    held(pools).release()
    # The arrival and the end are in one turn: the messages of clients are taken first, the clock last.
    if way == "abort":
        pools.step()
        pools.denoise.abort("a")
    else:
        pools.denoise.clock.advance(6.0)
    pools.run()
    assert pools.denoise.ended["a"].finish_reason is FinishReason(way)
    assert pools.prefill.peers.filling.counts.received == 1
    assert pools.prefill.peers.filling.counts.refused == 0
    pools.check_nothing_is_left()


# 40 and 20: ends in every state


def stages(pools: Pools) -> dict[str, bool]:
    """Return which states a hand-over of request "a" is in."""
    request = pools.denoise.loop.live.get("a")
    is_away = request is not None and request.status is Status.AWAY
    return {
        "waiting": request is None,
        "asked": is_away and not pools.prefill.loop.live,
        "prefilling": is_away and bool(pools.prefill.loop.live),
        "some blocks here": is_away and pools.denoise.loop.live["a"].standing.cached_len > 0,
        "all sent": pools.prefill.peers.filling.counts.sent == 1,
        "denoising": request is not None and not is_away and pools.denoise.peers.fetching.counts.arrived == 1,
    }


STAGES = ["waiting", "asked", "prefilling", "some blocks here", "all sent", "denoising"]


def bring_to(stage: str) -> Pools:
    pools = Pools(prefill_limits=Limits(max_prefill_tokens=8), link=HeldLink)
    if stage == "asked":
        asking(pools).is_holding = True
    submit(pools.denoise, "a", 41)
    submit(pools.denoise, "b", 6)
    pools.run_until(lambda: stages(pools)[stage])
    return pools


@pytest.mark.parametrize("stage", STAGES)
def test_an_abort_in_every_state(stage: str) -> None:
    pools = bring_to(stage)
    pools.denoise.abort("a")
    asking(pools).release()
    pools.run()
    assert pools.denoise.ended["a"].finish_reason is FinishReason.ABORT
    assert pools.denoise.tokens["b"] == expected(6, "b")
    pools.check_nothing_is_left()
    # 22: the id and the pages are used again at once.
    submit(pools.denoise, "z", 41)
    pools.run()
    assert pools.denoise.tokens["z"] == expected(41, "z")
    pools.close()


@pytest.mark.parametrize("stage", ["prefilling", "some blocks here"])
def test_a_connection_that_breaks_while_the_peer_may_still_write(stage: str) -> None:
    pools = bring_to(stage)
    asking(pools).is_fenced = False  # type: ignore[misc]
    asking(pools).cut("reset", is_over=False)
    pools.run_until(lambda: {"a", "b"} <= pools.denoise.ended.keys())
    assert pools.denoise.tokens["a"] == expected(41, "a")
    assert pools.denoise.num_draining() > 0
    pools.pass_time(30.0)
    pools.step()
    assert pools.denoise.num_draining() > 0
    pools.pass_time(40.0)
    pools.step()
    pools.check_nothing_is_left()
    pools.close()


@pytest.mark.parametrize("stage", STAGES)
def test_a_peer_that_is_gone_in_every_state(stage: str) -> None:
    pools = bring_to(stage)
    asking(pools).cut("killed")
    pools.run()
    for name, length in (("a", 41), ("b", 6)):
        assert pools.denoise.tokens[name] == expected(length, name)
        assert pools.denoise.ended[name].finish_reason is FinishReason.LENGTH
    assert sum(output.finish_reason is not None for output in pools.denoise.outputs) == 2
    pools.check_nothing_is_left()
    pools.close()


@pytest.mark.parametrize("stage", ["asked", "prefilling", "some blocks here"])
@pytest.mark.parametrize("is_fenced", [True, False])
def test_a_peer_that_falls_silent(stage: str, is_fenced: bool) -> None:
    pools = bring_to(stage)
    link = asking(pools)
    link.is_fenced = is_fenced  # type: ignore[misc]
    held(pools).is_holding = True
    link.is_holding = True
    fetching = pools.denoise.peers.fetching
    pools.denoise.inbox.put(PeerEvent(link, LinkSilent(seconds=5.0)))  # type: ignore[arg-type]
    pools.run_until(lambda: {"a", "b"} <= pools.denoise.ended.keys())
    assert pools.denoise.tokens["a"] == expected(41, "a")
    # Where the peer could still write to our pages, nobody gets them before it says that it does not.
    assert (fetching.num_draining_pages > 0) == (not is_fenced)
    submit(pools.denoise, "c", 20)
    asked = fetching.counts.asked
    pools.run_until(lambda: "c" in pools.denoise.ended)
    assert fetching.counts.asked == asked
    # It wakes up: what it had to say is refused, and it is asked again.
    link.release()
    held(pools).release()
    pools.denoise.inbox.put(PeerEvent(link, LinkHeard()))  # type: ignore[arg-type]
    submit(pools.denoise, "d", 20)
    pools.run()
    assert fetching.counts.asked == asked + 1
    assert pools.denoise.tokens["d"] == expected(20, "d")
    assert fetching.num_draining_pages == 0
    pools.check_nothing_is_left()
    pools.close()


def test_a_late_peer_is_given_up_and_its_pages_wait_for_its_word(pools: Pools) -> None:
    held(pools).is_holding = True
    submit(pools.denoise, "a", 33)
    pools.run_until(lambda: pools.prefill.peers.filling.counts.sent == 1)
    pages = set(pools.denoise.loop.live["a"].lease.pages)  # type: ignore[union-attr]
    pools.pass_time(TIMEOUT)
    pools.run_until(lambda: "a" in pools.denoise.ended)
    assert pools.denoise.tokens["a"] == expected(33, "a")
    fetching = pools.denoise.peers.fetching
    (draining,) = fetching.leases()
    assert draining.state is LeaseState.DRAINING
    assert set(draining.pages) == pages
    # Nobody else gets them, whoever comes meanwhile.
    for index in range(5):
        submit(pools.denoise, f"n{index}", 3)
    for _ in range(30):
        for request in pools.denoise.loop.live.values():
            assert not pages & set(request.lease.pages if request.lease else ())
        pools.step()
    held(pools).release()
    pools.run()
    assert fetching.num_draining_pages == 0
    assert fetching.counts.refused > 0
    pools.check_nothing_is_left()


def test_a_pool_without_room_waits_for_the_drain() -> None:
    pools = Pools(num_pages=12, link=HeldLink)
    held(pools).is_holding = True
    submit(pools.denoise, "a", 33)
    pools.run_until(lambda: pools.prefill.peers.filling.counts.sent == 1)
    pools.pass_time(TIMEOUT)
    for _ in range(10):
        pools.step()
    request = pools.denoise.loop.live["a"]
    assert request.status is Status.WAITING
    # Nothing can run, and the loop does not spin.
    assert pools.denoise.loop.may_wait() > 0  # type: ignore[operator]
    held(pools).release()
    pools.run()
    assert pools.denoise.tokens["a"] == expected(33, "a")
    pools.check_nothing_is_left()
    pools.close()


def test_a_peer_that_fails_the_request_is_not_asked_again(pools: Pools) -> None:
    pools.prefill.model.fail_on = 60
    pools.denoise.submit("bad", [60, *range(1, 20)], max_tokens=9)
    submit(pools.denoise, "good", 33)
    pools.run()
    alone = Harness()
    alone.submit("bad", [60, *range(1, 20)], max_tokens=9)
    alone.run()
    assert pools.denoise.tokens["bad"] == alone.tokens["bad"]
    assert pools.denoise.tokens["good"] == expected(33, "good")
    counts = pools.denoise.peers.fetching.counts
    assert (counts.asked, counts.failed, counts.arrived) == (2, 1, 1)
    pools.check_nothing_is_left()


def test_34_a_request_that_fails_on_both_sides_fails_alone(pools: Pools) -> None:
    pools.prefill.model.nan_on = pools.denoise.model.nan_on = 60
    pools.denoise.submit("bad", [60, *range(1, 20)], max_tokens=9)
    submit(pools.denoise, "good", 33)
    pools.run()
    assert pools.denoise.ended["bad"].finish_reason is FinishReason.ERROR
    assert "bad" in (pools.denoise.ended["bad"].error or "")
    assert pools.denoise.tokens["good"] == expected(33, "good")
    pools.check_nothing_is_left()


def test_a_prompt_too_long_for_the_peer_is_prefilled_here() -> None:
    pools = Pools(num_prefill_pages=4)
    submit(pools.denoise, "a", 33)
    pools.run()
    assert pools.denoise.tokens["a"] == expected(33, "a")
    assert pools.denoise.peers.fetching.counts.failed == 1
    pools.check_nothing_is_left()
    pools.close()


def test_a_peer_that_shuts_down_finishes_and_takes_nothing_new(pools: Pools) -> None:
    submit(pools.denoise, "a", 33)
    pools.run_until(lambda: bool(pools.prefill.loop.live))
    pools.prefill.stop(drain=True)
    pools.step()
    submit(pools.denoise, "b", 33)
    pools.run_until(lambda: {"a", "b"} <= pools.denoise.ended.keys())
    assert not pools.prefill.loop.is_alive
    for name in ("a", "b"):
        assert pools.denoise.tokens[name] == expected(33, name)


def test_wrong_and_doubled_ids_are_refused(pools: Pools) -> None:
    submit(pools.denoise, "a", 33)
    pools.run_until(lambda: bool(pools.prefill.loop.live))
    link, other = asking(pools), held(pools)
    (handover_id,) = pools.denoise.peers.fetching._fetches
    state = RequestState(known_ids=(1,) * 8, block_length=4)
    fetching, filling = pools.denoise.peers.fetching, pools.prefill.peers.filling
    before = fetching.counts.refused
    for message in (
        Blocks(handover_id="nobody", start=0, end=4),
        Done(handover_id="nobody", nfe=1),
        Failed(handover_id="nobody", reason="?"),
        Drained(handover_id=handover_id),
    ):
        other.send(message)
    for message in (
        Ask(handover_id=handover_id, state=state, start=0, pages=(0, 1)),
        Received(handover_id="nobody"),
        Received(handover_id=handover_id),
    ):
        link.send(message)
    pools.run()
    assert fetching.counts.refused == before + 4
    assert filling.counts.refused == 3
    assert filling.counts.asked == 1
    assert pools.denoise.tokens["a"] == expected(33, "a")
    pools.check_nothing_is_left()


@pytest.mark.parametrize(
    ("start", "end", "payload"),
    [(4, 8, b""), (0, 6, b""), (0, 64, b""), (0, 4, b"more than there is"), (0, 4, None)],
)
def test_blocks_that_make_no_sense_end_the_hand_over(
    pools: Pools, start: int, end: int, payload: bytes | None
) -> None:
    held(pools).is_holding = True
    submit(pools.denoise, "a", 33)
    pools.run_until(lambda: bool(held(pools).held))
    (handover_id,) = pools.denoise.peers.fetching._fetches
    other = Blocks(handover_id=handover_id, start=start, end=end)
    pools.denoise.inbox.put(PeerEvent(asking(pools), other, payload))  # type: ignore[arg-type]
    pools.step()
    assert pools.denoise.peers.fetching.counts.refused == 1
    assert pools.denoise.num_draining() > 0
    held(pools).release()
    pools.run()
    assert pools.denoise.tokens["a"] == expected(33, "a")
    pools.check_nothing_is_left()


@pytest.mark.parametrize(
    ("known", "start", "pages"),
    [
        ((1,) * 6, 0, (0,)),
        ((), 0, ()),
        ((1,) * 8, 0, (0,)),
        ((1,) * 8, 8, ()),
        ((64,) * 4, 0, (0,)),
        ((1,) * 8, 2, (0,)),
    ],
)
def test_an_ask_that_makes_no_sense_is_answered(
    pools: Pools, known: tuple[int, ...], start: int, pages: tuple[int, ...]
) -> None:
    held(pools).is_holding = True
    state = RequestState(known_ids=known, block_length=4)
    asking(pools).send(Ask(handover_id="odd", state=state, start=start, pages=pages))
    pools.step()
    pools.step()
    ((answer, _),) = held(pools).held
    assert isinstance(answer, Failed)
    assert not pools.prefill.loop.live


def test_a_lease_that_a_peer_writes_to_cannot_be_released() -> None:
    pool = PagePool(4, 4)
    lease = pool.lease("a")
    pool.extend(lease, 2)
    lease.become(LeaseState.PENDING)
    with pytest.raises(EngineError, match="pending"):
        pool.release(lease)
    lease.become(LeaseState.DRAINING)
    with pytest.raises(EngineError, match="draining"):
        pool.release(lease)
    with pytest.raises(EngineError, match="cannot be ready"):
        lease.become(LeaseState.READY)
    pool.check()
    lease.become(LeaseState.FAILED)
    pool.release(lease)
    assert pool.num_free == 4


def test_layouts_that_differ_name_the_field() -> None:
    import msgspec

    for name, value in (
        ("model", "other"),
        ("dtype", "bfloat16"),
        ("page_size", 8),
        ("block_length", 8),
        ("kv_shapes", ((2, 4),)),
        ("fingerprint", "1"),
    ):
        other = msgspec.structs.replace(LAYOUT, **{name: value})
        assert name in (LAYOUT.difference(other) or "")
    assert LAYOUT.difference(LAYOUT) is None


@pytest.mark.parametrize("seed", range(6))
def test_a_transport_that_delays_drops_and_doubles(seed: int) -> None:
    rng = random.Random(seed)

    class Link(UnreliableLink):
        drop, double, max_delay = rng.choice((0.0, 0.1, 0.4)), 0.3, rng.choice((0, 2, 5))

    Link.rng = rng
    pools = Pools(
        num_prefill=1 + seed % 2, link=Link, depth=seed // 3, prefill_limits=Limits(max_prefill_tokens=8)
    )
    lengths = {f"r{index}": rng.randint(1, 60) for index in range(20)}
    aborted = set(rng.sample(sorted(lengths), 4))
    waiting = sorted(lengths)
    for _ in range(400):
        if waiting and rng.random() < 0.3:
            name = waiting.pop()
            submit(pools.denoise, name, lengths[name])
        if rng.random() < 0.05:
            pools.denoise.abort(rng.choice(sorted(aborted)))
        pools.step()
        pools.pass_time(0.2)
    for name in aborted:
        pools.denoise.abort(name)
    pools.run(seconds=0.5)
    assert pools.denoise.ended.keys() == lengths.keys()
    for name in lengths.keys() - aborted:
        assert pools.denoise.tokens[name] == expected(lengths[name], name), name
    # What is still on its way concerns nobody any more.
    for _ in range(10):
        pools.step()
    pools.check_nothing_is_left()
    pools.close()


@pytest.mark.parametrize("num_pages", [24, 40])
def test_retractions_and_hand_overs_in_a_small_pool(num_pages: int) -> None:
    pools = Pools(num_pages=num_pages, num_prefill_pages=24, depth=int(num_pages > 30))
    lengths = {f"r{index}": 5 + 7 * index % 40 for index in range(12)}
    for name, length in lengths.items():
        pools.denoise.submit(name, length, max_tokens=30)
    pools.run()
    for name, length in lengths.items():
        alone = solo(Harness(), lambda one, name=name, length=length: one.submit(name, length, max_tokens=30))
        assert pools.denoise.tokens[name] == alone
    pools.check_nothing_is_left()
    pools.close()
