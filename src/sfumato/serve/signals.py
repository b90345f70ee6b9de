"""Counts the signals that ask a server to end."""

from __future__ import annotations

import asyncio
import signal


class Signals:
    """Counts the signals that ask the server to end."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._note)

    def _note(self) -> None:
        if self.first.is_set():
            self.second.set()
        self.first.set()
