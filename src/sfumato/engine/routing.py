"""Which replica takes a request: the one that is done with it first, as far as one can tell from outside.

Plain bookkeeping over token ids; knows no engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from sfumato.core.spec import ImageSpec, ScoreSpec, Spec, TextSpec

# Tokens that are compared together. Prefixes shorter than that are recomputed soon enough.
UNIT = 32
# Longer prefixes are told apart no further: about sixteen thousand tokens.
_MAX_UNITS = 512
# Remembered prefixes per replica, least recently used ones go first: about two million tokens.
_MAX_PREFIXES = 65_536
# A prompt's token is fed once, together with many others; one that is generated takes a share of a step.
PROMPT_COST = 0.05


@dataclass(slots=True)
class _Replica:
    """What is known of one replica; load: cost of what it has not ended, in output tokens."""

    load: float = 0.0
    is_alive: bool = True
    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)


class Router:
    """Chooses replicas by load and by the prefixes that they are likely to have cached.

    shares_prefixes: whether the model can reuse a prefix at all.
    """

    def __init__(self, num_replicas: int, *, shares_prefixes: bool) -> None:
        self._replicas = [_Replica() for _ in range(num_replicas)]
        self._shares_prefixes = shares_prefixes
        self._costs: dict[str, tuple[int, float]] = {}
        self._next = 0

    def choose(
        self, request_id: str, prompt_ids: Sequence[int], max_tokens: int, *, barred: Collection[int] = ()
    ) -> int:
        """Return the replica that a request goes to, none of the barred, and count it there until `end`.

        Raises LookupError if none is left.
        """
        chain = chain_of(prompt_ids) if self._shares_prefixes else ()
        best: tuple[float, int, int] | None = None
        for index, replica in enumerate(self._replicas):
            if not replica.is_alive or index in barred:
                continue
            fresh = len(prompt_ids) - UNIT * _num_known(replica, chain)
            cost = max_tokens + PROMPT_COST * fresh
            # Among equals, in turn.
            turn = (index - self._next) % len(self._replicas)
            rank = (replica.load + cost, turn, index)
            best = rank if best is None else min(best, rank)
        if best is None:
            raise LookupError("no replica is left")
        index = best[2]
        self._next = (index + 1) % len(self._replicas)
        replica = self._replicas[index]
        cost = best[0] - replica.load
        replica.load += cost
        self._costs[request_id] = (index, cost)
        _remember(replica, chain)
        return index

    def end(self, request_id: str) -> None:
        """Take note that a request has ended; an unknown one is nobody's."""
        index, cost = self._costs.pop(request_id, (0, 0.0))
        self._replicas[index].load -= cost

    def lose(self, index: int) -> None:
        """Send nothing to a replica any more."""
        self._replicas[index].is_alive = False

    def load(self, index: int) -> float:
        """Return the cost of what a replica has not ended, in output tokens."""
        return self._replicas[index].load


def chain_of(token_ids: Sequence[int]) -> tuple[int, ...]:
    """Return a hash of each prefix of whole units."""
    found, running = [], 0
    end = min(len(token_ids), UNIT * _MAX_UNITS)
    for start in range(0, end - UNIT + 1, UNIT):
        running = hash((running, tuple(token_ids[start : start + UNIT])))
        found.append(running)
    return tuple(found)


def size_of(spec: Spec) -> tuple[tuple[int, ...], int]:
    """Return the tokens that a request begins with, and how many it may output; of images, their steps."""
    match spec:
        case ScoreSpec():
            return spec.prompt_ids, len(spec.target_ids)
        case TextSpec():
            # What was delivered before is fed as the prompt is.
            return (*spec.prompt_ids, *spec.delivered), spec.max_tokens - len(spec.delivered)
        case ImageSpec():
            # No two images share a prefix.
            return (), spec.num_inference_steps * spec.num_images


def _num_known(replica: _Replica, chain: Sequence[int]) -> int:
    for number, prefix in enumerate(chain):
        if prefix not in replica.prefixes:
            return number
    return len(chain)


def _remember(replica: _Replica, chain: Sequence[int]) -> None:
    for prefix in chain:
        replica.prefixes[prefix] = None
        replica.prefixes.move_to_end(prefix)
    while len(replica.prefixes) > _MAX_PREFIXES:
        replica.prefixes.popitem(last=False)
