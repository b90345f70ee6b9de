"""The loop's inbox and outbox where its caller drives it step by step from the same thread."""

from __future__ import annotations

from collections import deque

from sfumato.core.messages import Message, Turn


class DirectInbox:
    """Messages from the same thread."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()

    def put(self, message: Message) -> None:
        """Queue a message for the next turn."""
        self._messages.append(message)

    is_called = False

    def filenos(self) -> tuple[int, ...]:
        """Nobody else adds messages."""
        return ()

    def drain(self, *, wait_seconds: float | None) -> list[Message]:
        """Return what is queued; nobody else could add to it while this thread waits."""
        messages = list(self._messages)
        self._messages.clear()
        return messages


class DirectOutbox:
    """Turns for the same thread."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []

    def send(self, turn: Turn) -> None:
        """Keep a turn until it is taken."""
        self._turns.append(turn)

    def take(self) -> list[Turn]:
        """Return the turns since the last call."""
        turns, self._turns = self._turns, []
        return turns
