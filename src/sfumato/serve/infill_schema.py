"""Body of /v1/infill: a text with gaps, each with its length in tokens or a range of lengths."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from sfumato.engine.frontend import SamplingParams
from sfumato.serve.errors import bad_request
from sfumato.serve.fields import OnePrompt, is_token_ids, whole
from sfumato.serve.schema import MAX_CHOICES_PER_CALL, Messages, TextRequest

# Every combination of lengths is a request of its own.
MAX_CANDIDATES = 64
_MAX_PARTS = 1024
_MAX_LENGTH = 1 << 20

_NOT_HERE = {
    "max_tokens": "the gaps say how many tokens are made",
    "stop": "what stands behind a gap ends it",
    "stop_token_ids": "what stands behind a gap ends it",
    "ignore_eos": "an end token never fills a gap",
}


@dataclass(frozen=True, slots=True)
class Gap:
    """A place for shortest to longest tokens."""

    shortest: int
    longest: int


def _part(value: object, at: int) -> str | list[int] | Gap:
    """A text, a list of token ids, or {"length": n} or {"length": [shortest, longest]}."""
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, list) and is_token_ids(value):
        return value
    if not (isinstance(value, dict) and set(value) == {"length"}):
        raise ValueError(f'part {at}: expected a text, token ids, or a gap such as {{"length": 4}}')
    length = value["length"]
    ends = [length, length] if type(length) is int else length
    if not (isinstance(ends, list) and len(ends) == 2 and all(type(end) is int for end in ends)):
        raise ValueError(f"part {at}: length is a number or [shortest, longest]")
    if not 1 <= ends[0] <= ends[1] <= _MAX_LENGTH:
        raise ValueError(f"part {at}: a gap has at least 1 token and ends where it begins or later")
    return Gap(*ends)


def _parts(value: object) -> object:
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_PARTS:
        raise ValueError(f"expected a list of 1 to {_MAX_PARTS} texts and gaps")
    parts = [_part(each, at) for at, each in enumerate(value)]
    gaps = [part for part in parts if isinstance(part, Gap)]
    if not gaps:
        raise ValueError("there is no gap to fill")
    # Counted without multiplying what may be huge.
    num_candidates = 1
    for gap in gaps:
        num_candidates *= gap.longest - gap.shortest + 1
        if num_candidates > MAX_CANDIDATES:
            raise ValueError(f"the gaps have more than {MAX_CANDIDATES} combinations of lengths")
    return parts


Parts = Annotated[Any, BeforeValidator(_parts)]


class InfillRequest(TextRequest):
    """Body of /v1/infill: behind messages the parts are the answer, behind a prompt they follow it."""

    parts: Parts
    prompt: OnePrompt = None
    messages: Messages | None = None

    @property
    def gaps(self) -> list[Gap]:
        """Return the gaps in order."""
        return [part for part in self.parts if isinstance(part, Gap)]

    def lengths(self) -> Iterator[tuple[int, ...]]:
        """Yield every combination of the gaps' lengths, shorter ones first."""
        return itertools.product(*(range(gap.shortest, gap.longest + 1) for gap in self.gaps))

    def params(self, seed: int) -> SamplingParams:
        """Return the engine's parameters, still without what is pinned. Raises ApiError."""
        self.check_stream()
        for name, reason in _NOT_HERE.items():
            if getattr(self, name) is not None:
                raise bad_request(f"{name} is not for /v1/infill: {reason}", name, "unsupported_value")
        if self.prompt is not None and self.messages is not None:
            raise bad_request("prompt and messages exclude each other", "messages")
        num_choices = len(list(self.lengths())) * (self.n or 1)
        if num_choices > MAX_CHOICES_PER_CALL:
            raise bad_request(
                f"the lengths times n are {num_choices} requests; {MAX_CHOICES_PER_CALL} are allowed", "n"
            )
        # Alternatives are not reported, but the tokens' own log probabilities choose among the lengths.
        return self.sampling(max_tokens=None, logprobs=0, seed=seed)
