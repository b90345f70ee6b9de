"""The work of one stage that a peer asked for, and nothing else of its request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sfumato.core.plan import RowKind, RowResult
from sfumato.core.request import Progress, Standing
from sfumato.core.spec import ImageSpec
from sfumato.image.door import ImageDoor
from sfumato.image.transfer import pack_outcome, unpack_asked
from sfumato.image.work import ImageWork


class StageWork(ImageWork):
    """Runs one row of a peer's request; outcome: what it has made, None before."""

    def __init__(self, door: ImageDoor, spec: ImageSpec, kind: RowKind, branch: str, payload: bytes) -> None:
        super().__init__(unpack_asked(door.begin(spec), kind, payload), door.family)
        self.outcome: Any = None
        self._stage = (kind, branch)

    def standing(self, request_id: str) -> Standing:
        """Return the stage's row; behind it nothing follows here."""
        kind, branch = self._stage
        rows = () if self.outcome is not None else (self.stage_row(request_id, kind, branch),)
        return Standing(request_id=request_id, missing=None, denoise=rows, remaining=1)

    def advance(self, results: Sequence[RowResult]) -> Progress:
        """Keep what the stage has made for whoever sends it."""
        self.outcome = results[0].outcome
        return Progress()

    def payload(self) -> bytes:
        """Return what the stage has made, as bytes."""
        return pack_outcome(self.outcome)
