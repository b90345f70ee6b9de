"""Which replica a request suits best: plain bookkeeping of prefixes, loads and groups; knows no Ray.

The longest cached prefix is weighed against load, in the same currency as `engine/routing.py`: output tokens.
A thousand replicas cost no more than ten: only those that are known to hold a prefix or a group, and two
others that are drawn, are compared.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sfumato.deploy.ticket import Hints
from sfumato.engine.routing import PROMPT_COST, UNIT

# A prompt that is fed where it was not cached also pushes out what others will have to feed again.
_FRESH_WEIGHT = 2.0
# By how much of its cost a request holds up the next one: texts share forwards that are far from full,
# pictures fill theirs. docs/benchmarks.md has what other values come to.
_TEXT_LOAD, _IMAGE_LOAD = 0.1, 1.0
# What a request saves that runs in the same forwards as others, as a share of its cost.
_GROUP_SAVING = 0.5
# Remembered prefixes over all replicas, least recently used ones go first: about eight million tokens.
_MAX_PREFIXES = 262_144
# Scores that differ by less than this share of a request's cost are equal; then the shorter queue decides.
_EQUAL_SHARE = 0.05


@dataclass(slots=True)
class _Replica:
    """What this front has sent to one replica and what has not ended; cost in output tokens."""

    cost: float = 0.0
    num_open: int = 0
    groups: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Placed:
    """One request that has been sent."""

    replica: str
    cost: float
    group: str


class Placing:
    """Ranks replicas for requests, and remembers what was sent where."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()
        self._replicas: dict[str, _Replica] = {}
        self._holders: OrderedDict[int, dict[str, None]] = OrderedDict()
        self._placed: dict[str, _Placed] = {}

    def keep(self, names: Sequence[str]) -> None:
        """Forget all replicas but these."""
        self._replicas = {name: self._replicas.get(name) or _Replica() for name in names}

    def choose(
        self, hints: Hints, names: Sequence[str], queue_len: Callable[[str], int | None]
    ) -> list[list[str]]:
        """Return replicas in ranks, the best first; those of one rank are equal but for their queues.

        queue_len: how many requests a replica has from everybody, as far as that is known.
        """
        able = [name for name in names if name not in hints.avoid] or list(names)
        known = self._known(hints.chain, set(able)) if hints.chain else {}
        compared = dict.fromkeys(known)
        if hints.group:
            compared.update(dict.fromkeys(name for name in able if hints.group in self._of(name).groups))
        compared.update(dict.fromkeys(self._rng.sample(able, min(2, len(able)))))
        fresh_cost = hints.cost + PROMPT_COST * hints.num_prompt_tokens
        scored = sorted(
            (self._score(name, hints, UNIT * known.get(name, 0), queue_len(name)), number, name)
            for number, name in enumerate(compared)
        )
        best = scored[0][0]
        equals = [name for score, _, name in scored if score - best <= _EQUAL_SHARE * fresh_cost]
        first = equals if len(equals) <= 2 else self._rng.sample(equals, 2)
        rest = [[name] for _, _, name in scored if name not in first]
        return [first, *rest, [name for name in able if name not in compared]]

    def _score(self, name: str, hints: Hints, num_cached: int, queue_len: int | None) -> float:
        """Return when a replica would be done with a request, in output tokens."""
        replica = self._of(name)
        load = replica.cost
        if queue_len is not None:
            # What other fronts have sent there is known by number alone: it costs as much as this request.
            load += max(0, queue_len - replica.num_open) * hints.cost
        fresh = max(0, hints.num_prompt_tokens - num_cached)
        cost = hints.cost + _FRESH_WEIGHT * PROMPT_COST * fresh
        if hints.group and hints.group in replica.groups:
            cost -= _GROUP_SAVING * hints.cost
        return (_IMAGE_LOAD if hints.group else _TEXT_LOAD) * load + cost

    def _known(self, chain: Sequence[int], able: set[str]) -> dict[str, int]:
        """Return for each replica that holds some of a prefix, how many units."""
        found: dict[str, int] = {}
        for number, prefix in enumerate(chain, start=1):
            holders = self._holders.get(prefix)
            if holders is None:
                break
            self._holders.move_to_end(prefix)
            for name in holders:
                if name in able:
                    found[name] = number
        return found

    def place(self, request_id: str, hints: Hints, name: str) -> None:
        """Note that a request was sent to a replica."""
        self.end(request_id)
        replica = self._of(name)
        cost = hints.cost + PROMPT_COST * hints.num_prompt_tokens
        replica.cost += cost
        replica.num_open += 1
        if hints.group:
            replica.groups[hints.group] = replica.groups.get(hints.group, 0) + 1
        self._placed[request_id] = _Placed(name, cost, hints.group)
        for prefix in hints.chain:
            holders = self._holders.setdefault(prefix, {})
            holders[name] = None
            self._holders.move_to_end(prefix)
        while len(self._holders) > _MAX_PREFIXES:
            self._holders.popitem(last=False)

    def end(self, request_id: str) -> None:
        """Note that a request has ended; an unknown one is nobody's."""
        placed = self._placed.pop(request_id, None)
        replica = None if placed is None else self._replicas.get(placed.replica)
        if placed is None or replica is None:
            return
        replica.cost -= placed.cost
        replica.num_open -= 1
        if placed.group:
            replica.groups[placed.group] -= 1
            if not replica.groups[placed.group]:
                del replica.groups[placed.group]

    def _of(self, name: str) -> _Replica:
        return self._replicas.setdefault(name, _Replica())
