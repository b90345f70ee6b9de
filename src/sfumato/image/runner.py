"""Runs plans of image rows: encodings, denoise steps, decodings, each on a lane of its own."""

from __future__ import annotations

import copy
import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.core.plan import Row, RowResult, StepPlan, StepResult
from sfumato.core.recording import UNRECORDED, Recorder
from sfumato.core.request import Request
from sfumato.core.spec import ImageSpec
from sfumato.image.denoise import Part, answers, step
from sfumato.image.families.protocol import Family
from sfumato.image.recorded import RecordedForwards
from sfumato.image.stages import decode, encode
from sfumato.image.state import ImageState, Inputs
from sfumato.image.work import PREVIEW, Decoded, ImageWork
from sfumato.models.graphs import Record

# Encodings of texts that are kept, in bytes.
_TEXT_CACHE_BYTES = 64 << 20
# Beyond so many pixels a picture is decoded in tiles, where its VAE can.
_TILED_PIXELS = 1536 * 1536


class EncodeRunner:
    """Encodes prompts and input images; encodings of texts are kept, the last used longest."""

    def __init__(
        self, family: Family, *, cache_bytes: int = _TEXT_CACHE_BYTES, recorder: Recorder = UNRECORDED
    ) -> None:
        self._family = family.with_own_tokenizers()
        self._cache_bytes = cache_bytes
        self._recorder = recorder
        self._cache: OrderedDict[tuple[Any, ...], Inputs] = OrderedDict()
        self._num_bytes = 0
        self.num_hits = 0

    @torch.no_grad()
    def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult:
        """Encode the plan's requests, one after another."""
        started = time.perf_counter()
        results = []
        for row in plan.rows:
            state = _state(live[row.request_id])
            try:
                with self._recorder.region("encode"):
                    outcome = encode(
                        self._family,
                        state,
                        lambda text, spec=state.spec: self._text(text, spec),  # type: ignore[misc]
                    )
                results.append(RowResult(row=row, outcome=outcome))
            except Exception as error:
                results.append(RowResult(row=row, error=_named("encoding", error)))
        return _result(plan, results, time.perf_counter() - started)

    def _text(self, text: str, spec: Any) -> Inputs:
        key = (text, *self._family.text_key(spec))
        if key in self._cache:
            self.num_hits += 1
            self._cache.move_to_end(key)
            return self._cache[key]
        found = self._cache[key] = self._family.encode_text(text, spec)
        self._num_bytes += num_bytes(found)
        while self._num_bytes > self._cache_bytes and len(self._cache) > 1:
            self._num_bytes -= num_bytes(self._cache.popitem(last=False)[1])
        return found


class DenoiseRunner:
    """One forward over the rows of all requests of a plan, then each request's own step.

    num_rows: deterministic mode, see `denoise.answers`. record: keeps forwards to be replayed.
    """

    def __init__(
        self,
        family: Family,
        *,
        num_rows: int | None = None,
        recorder: Recorder = UNRECORDED,
        record: Record | None = None,
    ) -> None:
        self._family = family
        self._recorder = recorder
        self._num_rows = num_rows
        self.forwards = None if record is None else RecordedForwards(family, record)

    @torch.no_grad()
    def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult:
        """Advance each request of the plan by one step; an error ends its request alone."""
        started = time.perf_counter()
        parts = [
            Part(request_id, _state(live[request_id]), tuple(row.branch for row in rows))
            for request_id, rows in plan.by_request().items()
        ]
        outputs = self._answers(parts)
        seconds = time.perf_counter() - started
        results = []
        for part in parts:
            rows = [row for row in plan.rows if row.request_id == part.request_id]
            outcome, error = self._step(part, outputs[part.request_id])
            results += [RowResult(row=row, outcome=outcome, error=error) for row in rows]
        return _result(plan, results, seconds)

    def _answers(self, parts: list[Part]) -> dict[str, dict[str, Any] | str]:
        """Return answers by request; where the joint forward raises, each is run alone to find who does."""
        expert = self._family.expert(parts[0].state)
        try:
            joint = answers(
                self._family,
                parts,
                expert=expert,
                num_rows=self._num_rows,
                recorder=self._recorder,
                run=self.forwards,
            )
            return dict(joint)
        except Exception as error:
            if len(parts) == 1:
                return {parts[0].request_id: _named("the forward", error)}
        found: dict[str, dict[str, Any] | str] = {}
        for part in parts:
            found |= self._answers([part])
        return found

    def _step(self, part: Part, outputs: dict[str, Any] | str) -> tuple[ImageState | None, str | None]:
        if isinstance(outputs, str):
            return None, outputs
        try:
            with self._recorder.region("combine"):
                return step(self._family, part.state, outputs), None
        except Exception as error:
            return None, _named(f"denoise step {part.state.step + 1}", error)


class DecodeRunner:
    """Decodes finished latents and previews; large pictures in tiles.

    together_pixels: pictures of one size, so many pixels in all, share a call of the VAE; 0: each has its
    own, and not a bit of it depends on what is decoded beside it.
    """

    def __init__(self, family: Family, *, together_pixels: int = 0, recorder: Recorder = UNRECORDED) -> None:
        self._family = family
        self._together_pixels = together_pixels
        self._recorder = recorder
        self._vae = family.pipeline.vae
        self._tiled: Any = None
        if hasattr(self._vae, "enable_tiling"):
            # Its weights are the same; only this copy is told to tile.
            self._tiled = copy.copy(self._vae)
            self._tiled.enable_tiling()

    @torch.no_grad()
    def launch(self, plan: StepPlan, live: Mapping[str, Request]) -> StepResult:
        """Decode the plan's requests, those of one size together."""
        started = time.perf_counter()
        groups: dict[tuple[int, ...], list[tuple[Row, Tensor, ImageSpec]]] = {}
        for row in plan.rows:
            state = _state(live[row.request_id])
            latents = state.estimate if row.branch == PREVIEW else state.latents
            assert latents is not None
            size = (state.spec.num_frames, state.spec.height, state.spec.width, *latents.shape[1:])
            groups.setdefault(size, []).append((row, latents, state.spec))
        results = [result for group in groups.values() for result in self._decoded(group)]
        return _result(plan, results, time.perf_counter() - started)

    def _decoded(self, group: list[tuple[Row, Tensor, ImageSpec]]) -> list[RowResult]:
        """Return the pictures of a group; where the joint call raises, each is decoded alone."""
        spec = group[0][2]
        pixels = spec.num_frames * spec.height * spec.width
        is_large = spec.height * spec.width > _TILED_PIXELS
        # Some VAEs keep what they have seen of a video on themselves: each decoding has its own copy; the
        # weights are the same.
        vae = copy.copy(self._tiled if is_large and self._tiled is not None else self._vae)
        try:
            with self._recorder.region("decode"):
                latents = torch.cat([latents for _, latents, _ in group]).to(self._family.device)
                images = decode(
                    self._family, latents, spec, vae, num_together=max(1, self._together_pixels // pixels)
                )
        except Exception as error:
            if len(group) == 1:
                return [RowResult(row=group[0][0], error=_named("decoding", error))]
            return [result for one in group for result in self._decoded([one])]
        shares = torch.split(images, [len(latents) for _, latents, _ in group])
        return [
            RowResult(row=row, outcome=Decoded(share, is_preview=row.branch == PREVIEW))
            for (row, _, _), share in zip(group, shares, strict=True)
        ]


def _result(plan: StepPlan, results: list[RowResult], seconds: float) -> StepResult:
    return StepResult(launch_id=plan.launch_id, rows=tuple(results), device_seconds=seconds)


def num_bytes(inputs: Inputs) -> int:
    """Return the bytes of a row's tensors."""
    values = [item for value in inputs.values() for item in (value if isinstance(value, list) else [value])]
    return sum(math.prod(value.shape) * value.element_size() for value in values)


def _state(request: Request) -> ImageState:
    work = request.work
    assert isinstance(work, ImageWork)
    return work.state


def _named(what: str, error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{what} failed: {first[0] if first else type(error).__name__}"
