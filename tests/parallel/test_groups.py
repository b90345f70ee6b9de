"""Groups and rendezvous: messages of any length, sums in any dtype, waits that end."""

from __future__ import annotations

import time

import pytest
import torch

from sfumato.errors import ConfigError, EngineError
from sfumato.parallel.groups import Group, Rendezvous, split_address
from tests.parallel.threads import run_ranks


def test_messages_of_any_length_arrive_in_order() -> None:
    lengths = [0, 1, 4087, 4088, 4089, 100_000]

    def talk(group: Group) -> list[bytes]:
        found = []
        for length in lengths:
            content = bytes(index % 251 for index in range(length))
            if group.rank == 0:
                group.announce(content)
                found.append(content)
            else:
                found.append(group.listen())
        return found

    first, *others = run_ranks(3, talk)
    assert [len(content) for content in first] == lengths
    assert others == [first, first]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_collectives_of_every_dtype(dtype: torch.dtype) -> None:
    def act(group: Group) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        own = torch.full((2, 3), group.rank + 1).to(dtype)
        return group.sum_(own.clone()), group.all_gather(own), group.gather(own)

    for rank, (total, everybody, gathered) in enumerate(run_ranks(3, act)):
        assert torch.equal(total, torch.full((2, 3), 6).to(dtype))
        assert [part.flatten()[0].item() for part in everybody] == [1, 2, 3]
        assert len(gathered) == (3 if rank == 0 else 0)


def test_a_silent_rank_is_told_within_the_bound() -> None:
    def act(group: Group) -> float:
        started = time.monotonic()
        if group.rank == 0:
            with pytest.raises(EngineError, match=r"rank 0 of 2 lost the others: .* not answered for 0.5 s"):
                group.sum_(torch.ones(1))
        else:
            time.sleep(1.0)
        return time.monotonic() - started

    assert run_ranks(2, act, seconds=0.5)[0] < 2


def test_a_rank_that_does_not_come_is_named() -> None:
    rendezvous = Rendezvous.host()
    joined = Rendezvous.join(rendezvous.address, seconds=5)
    with pytest.raises(EngineError, match="rank 0 of 3 is not ready after 0 s"):
        joined.meet("ready", 1, 3, check=lambda: None, seconds=0.1)
    with pytest.raises(EngineError, match="rank 2 of 3 is not ready after 0 s"):
        rendezvous.meet("ready", 0, 3, check=lambda: None, seconds=0.2)

    def pointless() -> None:
        raise EngineError("it has died")

    with pytest.raises(EngineError, match="it has died"):
        rendezvous.meet("up", 0, 2, check=pointless, seconds=60)


def test_addresses_are_checked() -> None:
    assert split_address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_address("[::1]:80") == ("::1", 80)
    for wrong in ("nowhere", ":80", "host:", "host:x", "host:99999"):
        with pytest.raises(ConfigError, match="is not host:port"):
            split_address(wrong)
    with pytest.raises(ConfigError, match="nobody answers"):
        Rendezvous.join("127.0.0.1:9", seconds=0.2)
    busy = Rendezvous.host()
    with pytest.raises(ConfigError, match=busy.address):
        Rendezvous.host_at(busy.address)
