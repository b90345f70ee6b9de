"""What the front door is started with; the engines have their own configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Frozen settings of one server.

    api_keys: any of them opens the door; none leaves it open. health_timeout: seconds that an engine may take
    to answer. drain_timeout: seconds that running requests get after the first signal. max_body_bytes: of a
    request, uploads included. has_profile: whether clients may record the engines' steps.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    health_timeout: float = 5.0
    drain_timeout: float = 60.0
    log_level: str = "warning"
    max_body_bytes: int = 50 << 20
    has_profile: bool = False
