"""Ranks as threads of one process: real groups over an in-memory store, without starting anything."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sfumato.parallel.groups import Group

T = TypeVar("T")
_SECONDS = 20.0


def run_ranks(size: int, act: Callable[[Group], T], *, seconds: float = _SECONDS) -> list[T]:
    """Run `act` on every rank at the same time; return what each returned, or raise what one raised."""
    store = dist.HashStore()
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            group = Group(store, rank=rank, size=size, device="cpu", seconds=seconds)
            with torch.inference_mode():
                results[rank] = act(group)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * _SECONDS)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results
