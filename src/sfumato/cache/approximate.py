"""Approximate caches of bidirectional models: which positions are fed, and whose old keys they see.

A request's slots hold keys of different ages. Every fed position writes its keys to slots and sees the first
`visible` of them; a policy is a choice of what to feed. Such slots are never shared between requests. After a
retraction the feeds that made them are repeated on the tokens that they saw then, so that the same old keys
come back and no decision is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Reuse(StrEnum):
    """Which keys of a block's first forward its later forwards reuse (Fast-dLLM, arXiv:2505.22618, 3.2)."""

    NOTHING = "none"
    PREFIX = "prefix"
    DUAL = "dual"


@dataclass(frozen=True, slots=True)
class Feed:
    """Positions [start, end) whose keys go to slots from `slot` on and whose queries see `visible` slots.

    slot None: nothing is kept, the positions see themselves alone. border: so many of the first positions are
    fed for their states alone, and keep the keys that they have.
    """

    start: int
    end: int
    slot: int | None = None
    visible: int | None = None
    border: int = 0

    @property
    def is_fresh(self) -> bool:
        """Whether no key of an earlier feed is seen."""
        return self.slot is None or (self.slot == 0 and self.visible == self.end - self.start)


def feed_of(reuse: Reuse, *, length: int, block: tuple[int, int], is_first: bool, border: int = 0) -> Feed:
    """Return what a block's step feeds: its first step everything, later ones what is not reused.

    border: positions in front of the block that are fed again because the block's first logits come from
    them.
    """
    border = min(border, block[0])
    start, end = block[0] - border, block[1]
    if reuse is Reuse.NOTHING:
        return Feed(0, length)
    if is_first:
        return Feed(0, length, slot=0, visible=length)
    if reuse is Reuse.PREFIX:
        end = length
    return Feed(start, end, slot=start, visible=length, border=border)


@dataclass(slots=True)
class FeedLog:
    """The feeds whose keys later feeds still see, each with the tokens it saw; and how many are repeated.

    num_repeated equals the number of feeds while the slots hold their keys.
    """

    feeds: list[tuple[Feed, Any]] = field(default_factory=list)
    num_repeated: int = 0

    def note(self, feed: Feed, tokens: Any) -> None:
        """Keep a feed; a fresh one makes all before it unneeded."""
        if feed.is_fresh:
            self.feeds.clear()
        self.feeds.append((feed, tokens))
        self.num_repeated = len(self.feeds)

    def lose(self) -> None:
        """Note that the slots were given back."""
        self.num_repeated = 0

    @property
    def all_missing(self) -> list[tuple[Feed, Any]]:
        """Return the feeds that must be repeated, in order."""
        return self.feeds[self.num_repeated :]
