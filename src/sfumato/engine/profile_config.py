"""Which steps of an engine are recorded, and where the traces go; resolved once at start."""

from __future__ import annotations

import msgspec

from sfumato.errors import ConfigError

DEFAULT_STEPS = 16
# The first steps of a process also compile kernels and fill caches.
DEFAULT_START = 8


class ProfileConfig(msgspec.Struct, frozen=True, kw_only=True):
    """skip: steps before the first one that is recorded."""

    folder: str
    num_steps: int = DEFAULT_STEPS
    skip: int = DEFAULT_START

    def check(self) -> None:
        """Raise ConfigError naming the option."""
        if self.num_steps < 1:
            raise ConfigError(f"--profile-steps {self.num_steps} must be at least 1")
        if self.skip < 0:
            raise ConfigError(f"--profile-start {self.skip} must be at least 0")
