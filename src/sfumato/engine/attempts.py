"""One request over the engines that run it: what its client has, and how often an engine died under it."""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec.structs import replace

from sfumato.core.messages import Output, Submit
from sfumato.errors import EngineError

# A request that was there when so many engines died is taken for the reason.
_MAX_LOSSES = 2


class Attempts:
    """What of a request is delivered, and what is left to be submitted elsewhere."""

    def __init__(self, submission: Submit, *, now: Callable[[], float] = time.monotonic) -> None:
        self._submission = submission
        self._now = now
        self._arrived_at = now()
        self._delivered: list[int] = []
        self._num_repeated = 0
        self._num_lost = 0

    def take(self, output: Output) -> Output | None:
        """Note what is delivered; None if the client has all of it already."""
        num_known = min(self._num_repeated, len(output.token_ids))
        self._num_repeated -= num_known
        fresh = output.token_ids[num_known:]
        self._delivered += fresh
        if num_known and not fresh and output.finish_reason is None:
            return None
        logprobs = None if output.logprobs is None else output.logprobs[num_known:]
        return replace(output, token_ids=fresh, logprobs=logprobs)

    def lose(self) -> None:
        """Note that the engine that ran it is gone."""
        self._num_lost += 1

    def again(self) -> Submit:
        """Return what to submit elsewhere. Raises EngineError if it was lost too often, or is too late."""
        name = self._submission.request_id
        if self._num_lost >= _MAX_LOSSES:
            raise EngineError(
                f"request {name!r} was there when {self._num_lost} engines died; it is not run again"
            )
        timeout = self._submission.timeout
        if timeout is not None:
            timeout -= self._now() - self._arrived_at
            if timeout <= 0:
                raise EngineError(f"request {name!r} had no time left when its engine died")
        self._num_repeated = len(self._delivered)
        return replace(self._submission, timeout=timeout)
