"""An engine that only prefills for others: a process without an HTTP door."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sfumato.engine.client import EngineClient
from sfumato.engine.wire import EngineInfo
from sfumato.errors import EngineDied
from sfumato.serve.launch import Planned, ProgressCallback
from sfumato.serve.signals import Signals

# The engine is asked this often whether it is still there.
_WATCH_SECONDS = 0.5


async def run_prefill(
    planned: Planned,
    *,
    drain_timeout: float,
    on_progress: ProgressCallback,
    on_ready: Callable[[EngineInfo], None],
) -> bool:
    """Run one prefill engine until a signal comes; return whether it got as far as serving.

    The first signal lets it finish what it was asked for; a second one, or the timeout, ends it. Raises
    ConfigError, EngineDied.
    """
    signals = Signals()
    planned.config.check()
    starting = asyncio.create_task(
        EngineClient.start(planned.config, lambda loading: on_progress(planned.label, loading))
    )
    leaving = asyncio.create_task(signals.first.wait())
    await asyncio.wait({starting, leaving}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return False
    client = starting.result()
    try:
        on_ready(client.info)
        while not (client.is_gone or leaving.done()):
            await asyncio.wait({leaving}, timeout=_WATCH_SECONDS)
        if client.is_gone:
            raise EngineDied(f"the prefill engine of {client.info.name} is gone")
        draining = asyncio.create_task(client.stop(drain=True))
        hurry = asyncio.create_task(signals.second.wait())
        await asyncio.wait({draining, hurry}, timeout=drain_timeout, return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        hurry.cancel()
    finally:
        leaving.cancel()
        await client.close()
    return True
