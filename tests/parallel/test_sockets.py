"""Links over TCP without a model: greetings, refusals, silence, loss and reconnection; pages as bytes."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch

from sfumato.core.handover import (
    Blocks,
    Done,
    Flushed,
    Layout,
    LinkHeard,
    LinkLost,
    LinkSilent,
    LinkUp,
    PeerEvent,
    Received,
)
from sfumato.errors import ConfigError, EngineError, PeerRefused
from sfumato.models.batch import KVStore
from sfumato.parallel.handover import CopyCarrier, KVPages
from sfumato.parallel.sockets import SocketEndpoint

LAYOUT = Layout(
    model="m", fingerprint="f", dtype="float32", page_size=2, block_length=2, kv_shapes=((1, 4), (2, 3))
)
PAGES, SIZE = 8, 2


def make_store(dtype: torch.dtype = torch.float32, *, seed: int | None = None) -> KVStore:
    store = KVStore.allocate(shapes=LAYOUT.kv_shapes, num_slots=PAGES * SIZE, dtype=dtype, device="cpu")
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in (*store.keys, *store.values):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return store


Make = Callable[..., SocketEndpoint]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[SocketEndpoint] = []

    def start(
        layout: Layout = LAYOUT, secret: bytes = b"s", silence: float = 30.0, store: KVStore | None = None
    ) -> SocketEndpoint:
        carrier = CopyCarrier(KVPages(store, SIZE))
        made.append(SocketEndpoint(layout, carrier, secret=secret, silence_seconds=silence))
        return made[-1]

    yield start
    for endpoint in made:
        endpoint.close()


def events(endpoint: SocketEndpoint, count: int, seconds: float = 10.0) -> list[PeerEvent]:
    """Wait for so many events."""
    found: list[PeerEvent] = []
    end = time.monotonic() + seconds
    while len(found) < count:
        left = end - time.monotonic()
        assert left > 0, f"only {found} came"
        select.select([endpoint.mailbox.fileno()], [], [], left)
        found += endpoint.mailbox.take()
    return found


def port_of(endpoint: SocketEndpoint) -> int:
    assert endpoint.address is not None
    return int(endpoint.address.rsplit(":", 1)[1])


def test_blocks_come_with_their_bytes_and_in_order(make: Make) -> None:
    source, target = make_store(seed=1), make_store()
    prefill, denoise = make(store=source), make(store=target)
    prefill.listen("127.0.0.1", 0)
    denoise.connect("127.0.0.1", port_of(prefill))
    (asked,), (asks,) = events(prefill, 1), events(denoise, 1)
    assert asked.news == LinkUp(prefills=False)
    assert asks.news == LinkUp(prefills=True)
    asked.link.push(Blocks(handover_id="h", start=0, end=4), [5, 1], [0, 3])
    asked.link.send(Done(handover_id="h", nfe=2))
    blocks, done = events(denoise, 2)
    assert blocks.news == Blocks(handover_id="h", start=0, end=4)
    assert done.news == Done(handover_id="h", nfe=2)
    assert blocks.payload is not None
    KVPages(target, SIZE).unpack([0, 3], blocks.payload)
    for ours, theirs in zip((*source.keys, *source.values), (*target.keys, *target.values), strict=True):
        assert torch.equal(theirs[[0, 1, 6, 7]], ours[[10, 11, 2, 3]])
        assert not theirs[[2, 3, 4, 5]].any()
    asks.link.send(Received(handover_id="h"))
    assert {type(event.news) for event in events(prefill, 2)} == {Flushed, Received}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_as_bytes_and_back(dtype: torch.dtype) -> None:
    source, target = make_store(dtype, seed=2), make_store(dtype)
    payload = KVPages(source, SIZE).pack([7, 0, 3])
    assert len(payload) == KVPages(source, SIZE).num_bytes(3) == 3 * SIZE * (2 * 10) * dtype.itemsize
    KVPages(target, SIZE).unpack([1, 2, 4], bytes(payload))
    assert KVPages(target, SIZE).pack([1, 2, 4]) == payload
    with pytest.raises(EngineError, match="2 pages take"):
        KVPages(target, SIZE).unpack([1, 2], payload)


def hear(capfd: pytest.CaptureFixture[str], words: str) -> None:
    """Wait until another thread has said something to the operator."""
    said, end = "", time.monotonic() + 10
    while words not in said:
        assert time.monotonic() < end, said
        time.sleep(0.01)
        said += capfd.readouterr().err


def test_another_secret_is_refused_on_both_sides(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    prefill = make()
    prefill.listen("127.0.0.1", 0)
    with pytest.raises(PeerRefused, match="wrong shared secret"):
        make(secret=b"other").connect("127.0.0.1", port_of(prefill))
    assert prefill.mailbox.take() == []
    hear(capfd, "was refused: wrong shared secret")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "n"),
        ("dtype", "bfloat16"),
        ("page_size", 4),
        ("kv_shapes", ((1, 4),)),
        ("transport", "nixl"),
    ],
)
def test_another_layout_is_refused_by_name(make: Make, name: str, value: object) -> None:
    prefill = make()
    prefill.listen("127.0.0.1", 0)
    with pytest.raises(PeerRefused, match=f"{name} is .* on the prefill side and .* on the denoise side"):
        make(msgspec.structs.replace(LAYOUT, **{name: value})).connect("127.0.0.1", port_of(prefill))


def test_strangers_are_turned_away(make: Make) -> None:
    prefill = make()
    prefill.listen("127.0.0.1", 0)
    for said in (b"GET / HTTP/1.1\r\n\r\n" * 4, b"\xff" * 64, b""):
        with socket.create_connection(("127.0.0.1", port_of(prefill)), timeout=5) as stranger:
            stranger.settimeout(10)
            # Closed with bytes of ours unread, a connection is reset: at any of our next calls.
            with contextlib.suppress(OSError):
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(4096):
                    pass
    assert prefill.mailbox.take() == []
    # Who fits still comes in.
    make().connect("127.0.0.1", port_of(prefill))
    assert events(prefill, 1)[0].news == LinkUp(prefills=False)


def test_an_address_in_use_is_named(make: Make) -> None:
    first = make()
    first.listen("127.0.0.1", 0)
    with pytest.raises(ConfigError, match=rf"--listen tcp://127.0.0.1:{port_of(first)}"):
        make().listen("127.0.0.1", port_of(first))


def test_an_engine_that_is_not_there_yet_is_waited_for(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    denoise = make()
    denoise.connect("127.0.0.1", port)
    hear(capfd, "is not there yet")
    prefill = make()
    prefill.listen("127.0.0.1", port)
    assert events(denoise, 1)[0].news == LinkUp(prefills=True)


def test_a_peer_that_goes_is_told_and_looked_for(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    prefill = make()
    prefill.listen("127.0.0.1", 0)
    port = port_of(prefill)
    denoise = make()
    denoise.connect("127.0.0.1", port)
    (up,) = events(denoise, 1)
    prefill.close()
    (lost,) = events(denoise, 1)
    assert lost.link is up.link
    assert isinstance(lost.news, LinkLost)
    assert lost.news.is_over
    # Sending to it is no error, and a new connection is another link.
    lost.link.send(Received(handover_id="late"))
    make().listen("127.0.0.1", port)
    (again,) = events(denoise, 1)
    assert again.news == LinkUp(prefills=True)
    assert again.link is not up.link
    hear(capfd, "has gone")


def test_a_peer_that_says_nothing_is_silent_until_it_speaks(make: Make) -> None:
    # This one speaks so seldom that the other must take it for silent, and it does so again and again.
    prefill = make(silence=2.0)
    prefill.listen("127.0.0.1", 0)
    denoise = make(silence=0.1)
    denoise.connect("127.0.0.1", port_of(prefill))
    kinds = [type(event.news) for event in events(denoise, 3)]
    assert kinds == [LinkUp, LinkSilent, LinkHeard]
