"""The denoiser's forwards recorded by shape and replayed: small models launch more than a GPU computes.

A shape is recorded when it comes up a second time: one that is drawn once is not worth the capture.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sfumato.image.families.protocol import Family
from sfumato.image.state import Inputs
from sfumato.models.graphs import Record, Recording

# Shapes that are kept, and shapes that were seen once and are remembered.
_MOST_RECORDINGS = 16
_MOST_SEEN = 256

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """A recording, and the inputs that it reads."""

    inputs: Inputs
    recording: Recording


class RecordedForwards:
    """Runs a family's forwards; those of a known shape are replayed. failure: why none is any more."""

    def __init__(self, family: Family, record: Record) -> None:
        self._family = family
        self._record = record
        self._places: dict[Key, _Place] = {}
        self._seen: set[Key] = set()
        self.failure: str | None = None
        self.num_replays = 0

    def __call__(self, inputs: Inputs, expert: str) -> Tensor:
        """Return the denoiser's answers f32[B, ...]."""
        key = self._key(inputs, expert)
        if key is None:
            return self._family.forward(inputs, expert)
        if key not in self._places:
            if key not in self._seen:
                self._note(key)
                return self._family.forward(inputs, expert)
            if not self._recorded(key, inputs, expert):
                return self._family.forward(inputs, expert)
        place = self._places[key]
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                place.inputs[name].copy_(value)
        self.num_replays += 1
        # The next replay writes over it.
        return place.recording.replay().clone()

    def _key(self, inputs: Inputs, expert: str) -> Key | None:
        """Return what a recording depends on; None where there can be none."""
        if self.failure is not None:
            return None
        parts: list[Any] = [expert]
        for name, value in sorted(inputs.items()):
            if isinstance(value, Tensor) and value.device == self._family.device:
                parts.append((name, tuple(value.shape), value.dtype))
            elif value is None or isinstance(value, (bool, int, float, str)):
                parts.append((name, value))
            else:
                return None
        key = tuple(parts)
        is_full = len(self._places) >= _MOST_RECORDINGS and key not in self._places
        return None if is_full else key

    def _note(self, key: Key) -> None:
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
        self._seen.add(key)

    def _recorded(self, key: Key, inputs: Inputs, expert: str) -> bool:
        own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        try:
            recording = self._record(lambda: self._family.forward(own, expert))
        except RuntimeError as error:
            # Whatever a model does that cannot be recorded, its forward can be run.
            self.failure = f"{type(error).__name__}: {error}"
            print(f"sfumato: steps run without CUDA graphs: {self.failure}", file=sys.stderr, flush=True)
            return False
        self._places[key] = _Place(own, recording)
        return True
