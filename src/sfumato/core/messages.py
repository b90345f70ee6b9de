"""Messages into and out of the loop; msgspec encodes them between processes."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from sfumato.core.spec import ImageSpec, ScoreSpec, TextSpec


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    ERROR = "error"


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """A new request; timeout in seconds from its arrival."""

    request_id: str
    spec: TextSpec | ScoreSpec | ImageSpec
    priority: int = 0
    timeout: float | None = None


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """End one request now."""

    request_id: str


class Pause(msgspec.Struct, frozen=True, tag="pause"):
    """Keep every request, run nothing."""


class Resume(msgspec.Struct, frozen=True, tag="resume"):
    """Run again after a pause."""


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping"):
    """Ask the loop to answer with the same token."""

    token: int


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """End the loop: after all accepted requests (drain), or at once with a terminal message each."""

    drain: bool


class Watch(msgspec.Struct, frozen=True, kw_only=True, tag="watch"):
    """Say from now on which requests each step ran, or no longer."""

    is_on: bool


Message = Submit | Abort | Pause | Resume | Ping | Stop | Watch


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """Log probability of a token at the step that decided it, and the best alternatives there."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """A log likelihood in nats; standard_error: of a Monte Carlo estimate, None where it is exact or unknown.

    tokens: each target token's own log probability, where they were asked for.
    """

    log_likelihood: float
    standard_error: float | None = None
    tokens: tuple[TokenLogprob, ...] = ()


class CanvasView(msgspec.Struct, frozen=True, kw_only=True):
    """The open block after a step: best guesses and confidences, counted from the first output token."""

    step: int
    start: int
    token_ids: tuple[int, ...]
    confidence: tuple[float, ...]
    undecided: tuple[bool, ...]


class StepProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How many of an image request's denoise steps are done."""

    done: int
    total: int


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """One image or video: uint8[num_frames, height, width, 3] as bytes.

    index: which of the request's images. step: denoise steps that it has behind it. is_preview: it shows what
    the request would end at, as estimated there.
    """

    index: int
    step: int
    is_preview: bool
    num_frames: int
    height: int
    width: int
    pixels: bytes


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a request has cost so far; nfe counts every forward it had a row in, prefill included."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    denoise_steps: int = 0
    nfe: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """Return emitted tokens per forward; 0 before the first forward."""
        return self.completion_tokens / self.nfe if self.nfe else 0.0


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """What one turn of the loop brought to one request; the last one has a finish reason.

    queue_seconds: from arrival to the first forward.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    canvas: CanvasView | None = None
    score: Score | None = None
    step: StepProgress | None = None
    pictures: tuple[Picture, ...] = ()
    usage: Usage = Usage()
    finish_reason: FinishReason | None = None
    error: str | None = None
    queue_seconds: float | None = None


class StepShare(msgspec.Struct, frozen=True, kw_only=True):
    """What one request had in one step: rows of one kind, and the positions that they fed."""

    request_id: str
    kind: str
    rows: int
    tokens: int


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """One step in numbers: what ran and how long.

    host_seconds: of the loop, without its waiting. hidden_seconds: of these, while a forward ran.
    wasted_rows: requests that were planned on a guess and had nothing left to run.
    shares: of the first requests in row order, while somebody watches.
    """

    launch_id: int
    kind: str
    rows: int
    tokens: int
    host_seconds: float
    device_seconds: float
    hidden_seconds: float = 0.0
    wasted_rows: int = 0
    shares: tuple[StepShare, ...] = ()


class Gauges(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine holds at the end of a turn.

    pages_draining: of those that are leased, how many wait for a peer to say that it writes no more. arrived,
    handovers_failed: prompts that peers have prefilled since the start, and that they were asked for in vain.
    """

    waiting: int
    running: int
    pages_free: int
    pages_leased: int
    pages_cached: int
    retractions: int
    pages_draining: int = 0
    arrived: int = 0
    handovers_failed: int = 0


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A submission that was not accepted: what is wrong with which field; if not final, try again later."""

    request_id: str
    message: str
    field: str | None = None
    is_final: bool = True


class Turn(msgspec.Struct, frozen=True, kw_only=True, tag="turn"):
    """Everything that one turn of the loop sends; every submission is answered by acceptance or refusal."""

    accepted: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    outputs: tuple[Output, ...] = ()
    steps: tuple[StepStats, ...] = ()
    gauges: Gauges | None = None
    pongs: tuple[int, ...] = ()
    stopped: bool = False
