"""All exceptions of Sfumato.

SfumatoError
├── RequestError        a bad request; refused at the edge (HTTP 400) with the field, the value and the limit
│   └── NotSupported    a legal field that this model or build refuses by name
├── CheckpointError     a checkpoint that cannot be loaded; names the tensor, the field or the file
├── ConfigError         options that exclude each other or cannot be met; raised at start
│   └── PeerRefused     a peer with another secret, another model or another layout; names the difference
└── EngineError         a broken invariant; stops the process
    ├── EngineDied      the engine process is gone; every request it held has ended
    └── DeadlinePassed  a request's time was over before an engine could take it
"""

from __future__ import annotations


class SfumatoError(Exception):
    """Base of all errors that Sfumato raises on purpose."""


class RequestError(SfumatoError, ValueError):
    """A request that cannot be served; `field`, `value` and `limit` name what is wrong."""

    def __init__(self, message: str, *, field: str, value: object = None, limit: object = None) -> None:
        super().__init__(message)
        self.field = field
        self.value = value
        self.limit = limit


class NotSupported(RequestError):
    """A field or a combination that exists elsewhere and is refused here by name."""


class CheckpointError(SfumatoError):
    """A checkpoint that is incomplete, damaged or of an unknown kind."""


class ConfigError(SfumatoError):
    """Options that contradict each other or the machine; both are named."""


class PeerRefused(ConfigError):
    """Two engines that cannot work together; says what differs."""


class EngineError(SfumatoError):
    """A broken invariant of the engine itself."""


class EngineDied(EngineError):
    """The engine process ended without being asked to."""


class DeadlinePassed(EngineError):
    """A request whose time is over."""
