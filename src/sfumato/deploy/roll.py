"""Who is there: fronts and helpers of a deployment, told by themselves and forgotten when they fall silent.

One small deployment. Everything in it is told again within seconds, so that nothing is lost with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# A call that has nothing new to tell returns after so long, and is made again.
_HOLD_SECONDS = 2.0
# Somebody who has not called for so long is gone.
_FORGET_SECONDS = 4 * _HOLD_SECONDS
_RETRY_SECONDS = 0.5

FRONT = "front"

_log = logging.getLogger("sfumato.deploy")


def helper_kind(role: str, model: str) -> str:
    """Return the kind of members that work for a model's engines."""
    return f"{role} {model}"


@dataclass(frozen=True, slots=True)
class Member:
    """One process. kind: a front or a helper. key: a front's public key, the secret of a helper."""

    kind: str
    name: str
    address: str
    key: bytes = b""


class Roll:
    """The members, and a number that grows whenever they change."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._members: dict[str, tuple[Member, float]] = {}
        self._version = 1
        self._changed = asyncio.Event()

    async def call(self, member: Member | None, version: int) -> tuple[int, list[Member]]:
        """Enter a member, if any; return all of them, once they differ from a version's, or after a while."""
        self._enter(member)
        end = self._now() + _HOLD_SECONDS
        while version == self._version and (left := end - self._now()) > 0:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                break
            self._forget()
        return self._version, [member for member, _ in self._members.values()]

    def _enter(self, member: Member | None) -> None:
        if member is not None:
            before = self._members.get(member.name)
            self._members[member.name] = member, self._now()
            if before is None or before[0] != member:
                self._change()
        self._forget()

    def _forget(self) -> None:
        limit = self._now() - _FORGET_SECONDS
        gone = [name for name, (_, at) in self._members.items() if at < limit]
        for name in gone:
            del self._members[name]
        if gone:
            self._change()

    def _change(self) -> None:
        self._version += 1
        self._changed.set()


async def attend(roll: Any, member: Member | None, on_members: Callable[[list[Member]], None]) -> None:
    """Stay on the roll and pass on who is there, at every change and now and then, until cancelled.

    roll: a handle of the deployment. While it is away, what is known stays.
    """
    version = -1
    while True:
        try:
            now, members = await roll.call.remote(member, version)
        except Exception as error:  # whatever Ray raises while the roll's node is replaced
            _log.warning("the roll does not answer: %s", type(error).__name__)
            await asyncio.sleep(_RETRY_SECONDS)
            continue
        version = now
        on_members(members)
