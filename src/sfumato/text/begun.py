"""A launch of text rows whose outcome has not been read: its answers on their way, and what may follow it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.plan import Row, RowKind, StepPlan
from sfumato.core.request import Request
from sfumato.text.advanced import Advanced, AdvancedRow
from sfumato.text.deciding import Decided
from sfumato.text.host_copies import HostCopies
from sfumato.text.statistics import PackedStatistics
from sfumato.text.windows import Output, Readable, Window
from sfumato.text.work import TextWork


class Begun:
    """Everything that `TextRunner.finish` needs, and the windows as the device has them.

    outputs: of the plan's rows. packed, decided: where their answers will lie on the host. is_finite: bool[P]
    of the hidden states, on the device.
    """

    def __init__(
        self,
        plan: StepPlan,
        outputs: Sequence[Output],
        decided: Sequence[Decided],
        packed: PackedStatistics | None,
        is_finite: Tensor,
        started: float,
    ) -> None:
        self.plan = plan
        self.outputs = outputs
        self.started = started
        self._copies = HostCopies(is_finite.device)
        self.packed = None if packed is None else packed.on_host(self._copies)
        self.decided = [group.on_host(self._copies) for group in decided]
        self._is_finite = self._copies.take(is_finite)
        self._copies.seal()
        self._on_device = decided
        self._advanced: dict[int, Advanced] = {}
        self._places: dict[str, tuple[int, int, Window]] = {
            window.request_id: (number, row, window)
            for number, group in enumerate(decided)
            for row, window in enumerate(group.members)
        }

    def wait(self) -> None:
        """Wait for the device."""
        self._copies.wait()

    def failures(self) -> dict[str, str]:
        """Return a message for each request whose hidden states or logits are not finite."""
        found: dict[str, str] = {}
        if not self._is_finite.all():
            hidden = self._is_finite.numpy()
            found |= self._failed(
                lambda output: hidden[output.hidden_start : output.hidden_start + len(output.tokens)],
                lambda row: f"the model's hidden states are not finite in positions {row.start} to {row.end}",
            )
        if self.packed is not None and not self.packed.is_finite.all():
            logits = self.packed.is_finite.numpy()
            found |= self._failed(
                lambda output: logits[output.offset : output.offset + output.num_read],
                lambda row: "the model's logits are not finite (NaN or infinity)",
            )
        return found

    def _failed(
        self, values_of: Callable[[Output], NDArray[np.bool_]], message: Callable[[Row], str]
    ) -> dict[str, str]:
        return {
            output.row.request_id: message(output.row)
            for output in self.outputs
            if not values_of(output).all()
        }

    def row(self, output: Output) -> Row:
        """Return what a row has turned out to be: behind the end of its block it was the block's commit."""
        window = output.window
        if window is None or window.ahead is None or not window.is_past:
            return output.row
        return replace(output.row, kind=RowKind.COMMIT) if window.work.traits.has_exact_cache else output.row

    def advanced(self, plan: StepPlan) -> dict[str, AdvancedRow]:
        """Return the windows that the next plan's rows go on from."""
        found = {}
        for row in plan.rows:
            number, index, window = self._places.get(row.request_id, (0, 0, None))
            if row.kind is RowKind.DENOISE and window is not None and not window.is_past:
                if number not in self._advanced:
                    with torch.inference_mode():
                        self._advanced[number] = self._on_device[number].advanced()
                found[row.request_id] = AdvancedRow(self._advanced[number], index)
        return found

    def rows_behind(self, request: Request, known: tuple[Row, ...], *, is_guess: bool) -> tuple[Row, ...]:
        """Return the rows of a request that may begin before this launch's outcome is read; () for none.

        known: its next rows as far as the host knows; is_guess: the outcome decides about them.
        """
        before = self.plan.by_request().get(request.id)
        if before is None:
            return known
        if not is_guess:
            # Exact keys come in order; feeds of old keys are noted one by one.
            return known if cast(Readable, request.work).traits.has_exact_cache else ()
        if request.id not in self._places or not isinstance(request.work, TextWork):
            return ()
        _, _, window = self._places[request.id]
        if window.is_past:
            # This launch runs on a block that is done, and writes its last keys.
            end = max(row.end for row in before)
            return tuple(row for row in known if row.kind is not RowKind.COMMIT or row.end > end)
        if request.work.again() is None:
            return ()
        return tuple(row for row in before if row.kind is RowKind.DENOISE)
