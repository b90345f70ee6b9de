"""Running the front door: a socket, the engines, uvicorn, and how all of it ends."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sfumato.errors import ConfigError
from sfumato.serve.launch import Planned, ProgressCallback, start_models
from sfumato.serve.settings import ServerSettings
from sfumato.serve.signals import Signals

if TYPE_CHECKING:
    from sfumato.serve.registry import Registry

# What answers requests, loaded while the engines load their models.
_FRONT = "sfumato.serve.front"

# Answers that were ended must still reach their clients.
_LAST_WORDS_SECONDS = 3

# Called with the served models and the port once the door is open.
ReadyCallback = Callable[["Registry", int], None]
# Called with a line for the operator when the server begins to end.
NoticeCallback = Callable[[str], None]


def open_socket(host: str, port: int) -> socket.socket:
    """Bind the address before a model is loaded, so that a taken port is known at once.

    Raises ConfigError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"--host {host} --port {port}: {error}") from error
    return listener


async def run_server(
    planned: Sequence[Planned],
    settings: ServerSettings,
    *,
    on_progress: ProgressCallback,
    on_ready: ReadyCallback,
    on_notice: NoticeCallback,
) -> bool:
    """Serve until a signal comes; return whether the server got as far as serving.

    The first signal lets running requests finish and refuses new ones; a second one, or the drain timeout,
    ends every request with a message. No process is left in any case. Raises ConfigError or EngineDied at
    start.
    """
    with contextlib.closing(open_socket(settings.host, settings.port)) as listener:
        signals = Signals()
        registry = await _start_or_leave(planned, on_progress, signals)
        if registry is None:
            return False
        try:
            await _serve(registry, settings, listener, signals, on_ready, on_notice)
        finally:
            await asyncio.gather(*(model.close() for model in registry.models.values()))
    return True


async def _start_or_leave(
    planned: Sequence[Planned], on_progress: ProgressCallback, signals: Signals
) -> Registry | None:
    """Start the engines; a signal meanwhile ends them again and returns None."""
    starting = asyncio.create_task(start_models(planned, on_progress))
    leaving = asyncio.create_task(signals.first.wait())
    # In a thread, so that progress and signals are seen meanwhile.
    loading = asyncio.create_task(asyncio.to_thread(importlib.import_module, _FRONT))
    await asyncio.wait({starting, leaving}, return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    await loading
    if starting.done():
        return starting.result()
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    return None


async def _serve(
    registry: Registry,
    settings: ServerSettings,
    listener: socket.socket,
    signals: Signals,
    on_ready: ReadyCallback,
    on_notice: NoticeCallback,
) -> None:
    from sfumato.serve.front import make_front

    server = make_front(registry, settings, last_words_seconds=_LAST_WORDS_SECONDS)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    asked = asyncio.create_task(signals.first.wait())
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    on_ready(registry, listener.getsockname()[1])
    await asyncio.wait({serving, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    await _drain(registry, settings, signals, on_notice)
    server.should_exit = True
    await serving


async def _drain(
    registry: Registry, settings: ServerSettings, signals: Signals, on_notice: NoticeCallback
) -> None:
    """Let the engines finish what they have, within the time that the operator gives them."""
    registry.is_draining = True
    clients = [model.client for model in registry.models.values()]
    num_open = sum(client.num_open for client in clients)
    if num_open:
        on_notice(f"finishing {num_open} running requests; Ctrl-C again ends them")
    draining = asyncio.create_task(_stop(registry, drain=True))
    hurry = asyncio.create_task(signals.second.wait())
    await asyncio.wait({draining, hurry}, timeout=settings.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if not draining.done():
        num_open = sum(client.num_open for client in clients)
        on_notice(f"ending {num_open} requests")
        await asyncio.wait({asyncio.create_task(_stop(registry, drain=False))}, timeout=_LAST_WORDS_SECONDS)
    # An engine inside a long forward answers to nothing; it is killed when it is closed.
    draining.cancel()


async def _stop(registry: Registry, *, drain: bool) -> None:
    await asyncio.gather(*(model.client.stop(drain=drain) for model in registry.models.values()))
