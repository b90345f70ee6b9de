"""One request over the engines that it runs on: what its client has already, and what became of them.

An engine that is gone is nobody's fault at first. Its requests run again, behind what was delivered. Until
one of them has come further than it was, it is a suspect; an engine that ends with a suspect on it, the only
one there, was ended by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec.structs import replace

from sfumato.core.messages import CanvasView, FinishReason, Output, Picture, StepProgress, Submit, Usage
from sfumato.core.spec import TextSpec
from sfumato.errors import DeadlinePassed, EngineError

# Machines that fail are no request's fault, but a request that has met so many of them ends.
MAX_LOSSES = 5


class Attempts:
    """What one request has behind it. is_suspect: it may be what ended its engine."""

    def __init__(self, submission: Submit, *, now: Callable[[], float] = time.monotonic) -> None:
        self.submission = submission
        self.is_suspect = False
        self._is_poison = False
        self._now = now
        self._deadline = None if submission.timeout is None else now() + submission.timeout
        self._num_lost = 0
        self._tokens: list[int] = []
        self._step: StepProgress | None = None
        self._pictures: set[tuple[int, int, bool]] = set()
        # Of the attempts before this one, and as this one has it.
        self._before, self._usage = Usage(), Usage()

    def take(self, output: Output) -> Output | None:
        """Return what is new of an output, its costs with those of earlier attempts; None if nothing is."""
        pictures = tuple(each for each in output.pictures if _key(each) not in self._pictures)
        step = output.step
        if step is not None and self._step is not None and step.done <= self._step.done:
            step = None
        if output.token_ids or pictures or step is not None:
            self.is_suspect = False
        self._tokens.extend(output.token_ids)
        self._pictures.update(map(_key, pictures))
        self._step, self._usage = step or self._step, output.usage
        if not self._num_lost:
            return output
        fresh = replace(
            output,
            pictures=pictures,
            step=step,
            usage=self._summed(output.usage),
            canvas=self._counted_on(output.canvas),
        )
        is_empty = not (fresh.token_ids or pictures or step or fresh.canvas or fresh.score)
        return None if is_empty and fresh.finish_reason is None else fresh

    def lose(self, *, is_blamed: bool = True) -> None:
        """Take note that its engine is gone; is_blamed: by itself, not with the machine that it ran on."""
        self._num_lost += 1
        self._before = self._summed(self._usage)
        self._usage = Usage()
        self._is_poison = self._is_poison or (is_blamed and self.is_suspect)
        self.is_suspect = is_blamed or self.is_suspect

    def check(self) -> None:
        """Raise EngineError if it ended two engines or met too many that ended, DeadlinePassed."""
        if self._is_poison:
            raise EngineError("the engine ended twice at the same place of this request; it is not run again")
        if self._num_lost >= MAX_LOSSES:
            raise EngineError(f"the request has lost {self._num_lost} engines; it is not run again")
        timeout = self.seconds_left
        if timeout is not None and timeout <= 0:
            raise DeadlinePassed(f"the request's {self.submission.timeout} seconds are over")

    def again(self) -> Submit:
        """Return what the next engine is asked for. Raises as `check` does."""
        self.check()
        spec = self.submission.spec
        if isinstance(spec, TextSpec):
            spec = replace(spec, delivered=(*spec.delivered, *self._tokens))
        return replace(self.submission, spec=spec, timeout=self.seconds_left)

    @property
    def seconds_left(self) -> float | None:
        """Return the time to its deadline, None where it has none."""
        return None if self._deadline is None else self._deadline - self._now()

    def failed(self, error: Exception) -> Output:
        """Return the end of a request that is not run again."""
        is_late = isinstance(error, DeadlinePassed)
        return Output(
            request_id=self.submission.request_id,
            usage=self._before,
            finish_reason=FinishReason.TIMEOUT if is_late else FinishReason.ERROR,
            error=str(error),
        )

    def _summed(self, usage: Usage) -> Usage:
        before = self._before
        return replace(
            usage,
            prompt_tokens=max(before.prompt_tokens, usage.prompt_tokens),
            completion_tokens=max(before.completion_tokens, usage.completion_tokens),
            cached_tokens=before.cached_tokens if self._num_lost else usage.cached_tokens,
            denoise_steps=before.denoise_steps + usage.denoise_steps,
            nfe=before.nfe + usage.nfe,
        )

    def _counted_on(self, canvas: CanvasView | None) -> CanvasView | None:
        if canvas is None:
            return None
        return replace(canvas, step=canvas.step + self._before.denoise_steps)


def _key(picture: Picture) -> tuple[int, int, bool]:
    """Return what tells a picture from the others of its request."""
    return picture.index, picture.step, picture.is_preview
