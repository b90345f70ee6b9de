"""An image request's work: which rows come next, what their results change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from sfumato.core.messages import FinishReason, Picture, StepProgress, Usage
from sfumato.core.plan import Cost, Row, RowKind, RowResult
from sfumato.core.request import Progress, Standing
from sfumato.errors import EngineError
from sfumato.image.families.protocol import Family
from sfumato.image.state import ImageState

PREVIEW, FINAL = "preview", "final"
_LATENT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Decoded:
    """Pictures f32[N, F, 3, H, W] in 0..1."""

    images: Tensor
    is_preview: bool


class ImageWork:
    """Goes through the stages of one request: encode, denoise step by step, decode.

    is_deterministic: rows whose texts differ in length share no forward, whatever the family could mask.
    """

    def __init__(self, state: ImageState, family: Family, *, is_deterministic: bool = False) -> None:
        self.state = state
        self._family = family
        self._is_deterministic = is_deterministic
        self._previewed = 0
        self._nfe = 0
        self._previews = preview_steps(state.num_steps, state.spec.num_previews)

    def standing(self, request_id: str) -> Standing:
        """Return the rows of the next stage; a step is known in advance where another step comes first."""
        rows = self._rows(request_id)
        state = self.state
        is_next_known = rows[0].kind is RowKind.DENOISE and not self._stops_at(state.step + 1)
        tokens = sum(row.cost.tokens for row in rows if row.kind is RowKind.DENOISE)
        return Standing(
            request_id=request_id,
            missing=None,
            denoise=rows,
            pages_ahead=0 if is_next_known else None,
            remaining=max(1, self._next_shown() - state.step) * (tokens or self._tokens()),
        )

    def _next_shown(self) -> int:
        """Return the step behind which a client sees something first: a preview, else the pictures."""
        return (
            min(self._previews, default=self.state.num_steps) if not self._previewed else self.state.num_steps
        )

    def _tokens(self) -> int:
        return self._family.num_tokens(self.state.spec) * self.state.num_images

    def _stops_at(self, step: int) -> bool:
        """Whether something else than a denoise step comes when so many are done."""
        return step >= self.state.num_steps or self._is_preview_due(step)

    def _is_preview_due(self, step: int) -> bool:
        return step in self._previews and step > self._previewed

    def _rows(self, request_id: str) -> tuple[Row, ...]:
        state = self.state
        if not state.is_encoded:
            return (self.stage_row(request_id, RowKind.ENCODE, "encode"),)
        if state.is_denoised:
            return (self.stage_row(request_id, RowKind.DECODE, FINAL),)
        if self._is_preview_due(state.step):
            return (self.stage_row(request_id, RowKind.DECODE, PREVIEW),)
        cost = self._cost()
        return tuple(
            Row(
                request_id=request_id,
                kind=RowKind.DENOISE,
                start=state.step,
                end=state.step + 1,
                branch=branch,
                key=self._key(),
                cost=cost,
            )
            for branch in self._family.branches(state)
        )

    def stage_row(self, request_id: str, kind: RowKind, branch: str) -> Row:
        """Return a row of a stage beside the steps; it costs its pixels, and small ones are run together."""
        step, spec = self.state.step, self.state.spec
        pixels = spec.height * spec.width * spec.num_frames * self.state.num_images
        return Row(
            request_id=request_id,
            kind=kind,
            start=step,
            end=step,
            branch=branch,
            key=str(kind),
            cost=Cost(rows=1, tokens=pixels),
        )

    def _key(self) -> str:
        """Return what rows of one forward have in common: the model, shapes, and what it cannot mask."""
        state, family = self.state, self._family
        assert state.latents is not None
        shape = "x".join(str(size) for size in state.latents.shape[1:])
        parts = [family.expert(state), shape, "x".join(str(size) for size in family.noise_shape(state.spec))]
        if self._is_deterministic or not family.masks_text:
            parts += sorted(
                {str(length) for inputs in state.conditioning.values() for length in _lengths(inputs)}
            )
        return " ".join(parts)

    def _cost(self) -> Cost:
        state = self.state
        assert state.latents is not None
        return Cost(
            tokens=self._tokens(), rows=state.num_images, latent_bytes=state.latents.numel() * _LATENT_BYTES
        )

    def resume_at(self, cached_len: int) -> None:
        """A state has no keys and values: it goes on where it stood."""

    def arrive(self, cached_len: int, nfe: int) -> None:
        """No peer computes a part of it in pages."""
        raise EngineError("an image request has no pages that could arrive")

    def advance(self, results: Sequence[RowResult]) -> Progress:
        """Take what a stage has made of the state."""
        outcome = results[0].outcome
        if isinstance(outcome, Decoded):
            return self._show(outcome)
        assert isinstance(outcome, ImageState)
        if results[0].row.kind is RowKind.DENOISE:
            self._nfe += 1
        self.state = outcome
        return Progress(step=StepProgress(done=outcome.step, total=outcome.num_steps))

    def _show(self, decoded: Decoded) -> Progress:
        state = self.state
        shown = pictures(decoded.images, step=state.step, is_preview=decoded.is_preview)
        if decoded.is_preview:
            self._previewed = state.step
            return Progress(pictures=shown)
        self.state = replace(state, images=decoded.images)
        return Progress(pictures=shown, finish_reason=FinishReason.STOP)

    def usage(self) -> Usage:
        """Return what the request has cost; a step's branches count as one forward."""
        return Usage(denoise_steps=self.state.step, nfe=self._nfe)


def preview_steps(num_steps: int, num_previews: int) -> frozenset[int]:
    """Return after which steps a preview is shown: evenly spaced, never after the last one."""
    places = (round(number * num_steps / (num_previews + 1)) for number in range(1, num_previews + 1))
    return frozenset(place for place in places if 0 < place < num_steps)


def pictures(images: Tensor, *, step: int, is_preview: bool) -> tuple[Picture, ...]:
    """Return f32[N, F, 3, H, W] in 0..1 as pictures of bytes."""
    levels = (images * 255).round().clamp(0, 255).permute(0, 1, 3, 4, 2).numpy().astype(np.uint8)
    num, frames, height, width, _ = levels.shape
    return tuple(
        Picture(
            index=index,
            step=step,
            is_preview=is_preview,
            num_frames=frames,
            height=height,
            width=width,
            pixels=levels[index].tobytes(),
        )
        for index in range(num)
    )


def _lengths(inputs: dict[str, object]) -> list[int]:
    """Return how long the texts of some inputs are."""
    for value in inputs.values():
        if isinstance(value, list) and isinstance(value[0], Tensor):
            return [len(text) for text in value]
    text = inputs.get("encoder_hidden_states")
    return [int(text.shape[1])] if isinstance(text, Tensor) else []
