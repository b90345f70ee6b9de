"""The parts of a step by name, for whoever records them; by default nobody does."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from sfumato.core.plan import StepPlan

# One for all: it holds nothing, so that a part without a record costs two calls.
NOTHING: AbstractContextManager[None] = nullcontext()


class Recorder(Protocol):
    """Told what a step does, from the threads that do it."""

    def step(self, plan: StepPlan) -> AbstractContextManager[object]:
        """Enclose a launch, from its rows to what its requests take of it."""
        ...

    def region(self, name: str) -> AbstractContextManager[object]:
        """Enclose a part of a turn."""
        ...


class Unrecorded:
    """A recorder that keeps nothing."""

    def step(self, plan: StepPlan) -> AbstractContextManager[object]:
        """Return what does nothing."""
        return NOTHING

    def region(self, name: str) -> AbstractContextManager[object]:
        """Return what does nothing."""
        return NOTHING


UNRECORDED = Unrecorded()
