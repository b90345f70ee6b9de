"""Keeps apart requests under which an engine has died: the one to blame takes no other with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Quarantine:
    """Lets each suspect run where no other one does; num_replicas: how many there are. Places come later."""

    def __init__(self, num_replicas: Callable[[], int]) -> None:
        self._num_replicas = num_replicas
        # Suspects and where they run; None: on the way to a replica.
        self._hosts: dict[str, str | None] = {}
        self._changed = asyncio.Event()

    async def enter(self, request_id: str) -> frozenset[str]:
        """Wait until there may be a replica without a suspect; return those that have one."""
        while None in self._hosts.values() or len(self._hosts) >= max(1, self._num_replicas()):
            self._changed.clear()
            await self._changed.wait()
        taken = frozenset(host for host in self._hosts.values() if host is not None)
        self._hosts[request_id] = None
        return taken

    def place(self, request_id: str, replica: str) -> None:
        """Note where a suspect runs."""
        if request_id in self._hosts:
            self._hosts[request_id] = replica
            self._changed.set()

    def leave(self, request_id: str) -> None:
        """Note that a suspect has ended, or its replica."""
        if self._hosts.pop(request_id, "") != "":
            self._changed.set()
