"""The HTTP server around the application; loading this loads everything that answers requests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import uvicorn

from sfumato.serve.app import create_app
from sfumato.serve.registry import Registry
from sfumato.serve.settings import ServerSettings

_BACKLOG = 2048


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: the first signal drains, which only the front door can do."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_front(registry: Registry, settings: ServerSettings, *, last_words_seconds: int) -> uvicorn.Server:
    """Return the server over engines that are running."""
    config = uvicorn.Config(
        create_app(registry, settings),
        log_level=settings.log_level,
        backlog=_BACKLOG,
        lifespan="off",
        timeout_graceful_shutdown=last_words_seconds,
    )
    return _Uvicorn(config)
