"""Pictures that clients fetch by url: kept in memory for a while, within a bound."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

# As long as OpenAI's urls last.
_SECONDS = 3600.0
_MAX_BYTES = 256 << 20
_ID_BYTES = 24


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    expires_at: float


class ImageFiles:
    """The newest pictures by names that nobody can guess; the oldest go when they are too many or too old."""

    def __init__(
        self,
        *,
        max_bytes: int = _MAX_BYTES,
        seconds: float = _SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._clock = clock
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._num_bytes = 0

    def add(self, content: bytes, *, extension: str, media_type: str) -> str:
        """Keep a picture and return its name. The newest is kept whatever its size."""
        name = f"{secrets.token_urlsafe(_ID_BYTES)}.{extension}"
        self._files[name] = _File(content, media_type, self._clock() + self._seconds)
        self._num_bytes += len(content)
        self._expire()
        while self._num_bytes > self._max_bytes and len(self._files) > 1:
            self._drop_oldest()
        return name

    def find(self, name: str) -> tuple[bytes, str] | None:
        """Return content and media type of a picture that is still kept."""
        self._expire()
        found = self._files.get(name)
        return None if found is None else (found.content, found.media_type)

    def _expire(self) -> None:
        now = self._clock()
        while self._files and next(iter(self._files.values())).expires_at <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, oldest = self._files.popitem(last=False)
        self._num_bytes -= len(oldest.content)
