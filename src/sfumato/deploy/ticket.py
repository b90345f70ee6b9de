"""What a request is while it is routed: a ticket that travels, and hints that stay where the router is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Front:
    """Where replicas reach a front, and the public key that proves that they were told so by the cluster."""

    address: str
    key: bytes


@dataclass(slots=True)
class Hints:
    """What a router needs to know of a request.

    cost: what it costs without its prompt, in output tokens or steps. chain: a hash of each prefix of whole
    units. group: requests of the same group run in the same forwards (images). avoid: replicas that should
    not have it. chosen: what the router made of it.
    """

    cost: float = 1.0
    num_prompt_tokens: int = 0
    chain: tuple[int, ...] = ()
    group: str = ""
    avoid: frozenset[str] = frozenset()
    chosen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ticket:
    """All that a replica is told through Ray: which request waits for it, where, and in which trace."""

    id: str
    front: Front
    trace: dict[str, str] = field(default_factory=dict, compare=False)
    hints: Hints = field(default_factory=Hints, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel without the hints: the router has read them."""
        return Ticket, (self.id, self.front, self.trace)
