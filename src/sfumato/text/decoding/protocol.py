"""What a decoding algorithm is given and what it answers.

Letters: R rows of one algorithm, W window positions (rows of shorter windows are padded with positions that
are neither undecided nor editable).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from sfumato.errors import RequestError


@dataclass(frozen=True, slots=True)
class View:
    """The open windows of R rows.

    token_ids: i64[R, W]. undecided, editable: bool[R, W]; editable positions are decided and not pinned.
    step: i64[R] steps the block has taken. masks_at_start: i64[R] undecided positions when the block opened.
    block_length, num_blocks: per row. uniform: f32[R, W] random numbers where an algorithm asks for them.
    """

    token_ids: Tensor
    undecided: Tensor
    editable: Tensor
    step: Tensor
    masks_at_start: Tensor
    block_length: Sequence[int]
    num_blocks: Sequence[int]
    uniform: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the logits say: token i64[R, W], best or sampled; confidence f32[R, W], its probability."""

    token: Tensor
    confidence: Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """transfer: bool[R, W] positions that take their token now. tokens: i64[R, W].

    done: bool[R] ends the block now; None: it ends when nothing is undecided. states: one per row.
    """

    transfer: Tensor
    tokens: Tensor
    done: Tensor | None = None
    states: Sequence[Any] | None = None


@dataclass(frozen=True, slots=True)
class Transform:
    """What is done to a row's logits before its statistics.

    guidance_scale: (s + 1) cond - s uncond where not 0. excluded_ids: never chosen.
    confidence_excluded_ids: left out of the probabilities; a position whose token is one has confidence 0.
    filtered_confidence: probabilities after temperature and filters instead of the model's own.
    """

    guidance_scale: float = 0.0
    excluded_ids: tuple[int, ...] = ()
    confidence_excluded_ids: tuple[int, ...] = ()
    filtered_confidence: bool = False


class Algorithm(Protocol):
    """A decoding algorithm with its parameters: a frozen value.

    is_monotone: a decided position never changes again, so it may be streamed at once.
    reads_decided: statistics of decided, unpinned positions are needed too.
    """

    is_monotone: ClassVar[bool]
    reads_decided: ClassVar[bool]

    @property
    def needs_uniform(self) -> bool:
        """Whether `View.uniform` must be filled for this row."""
        ...

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """Return the transform of this row's logits, given the model's end tokens."""
        ...

    def check(self, *, block_length: int, num_blocks: int, is_bidirectional: bool) -> None:
        """Raise RequestError where the parameters do not fit the request's canvas or model."""
        ...

    @staticmethod
    def decide(rows: Sequence[Any], view: View, statistics: Statistics, states: Sequence[Any]) -> Outcome:
        """Choose positions for R rows at once, each by its own parameters."""
        ...


def parameter(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Declare a parameter that a request may set, with its range and what it means."""
    metadata = {"doc": doc, "minimum": minimum, "maximum": maximum, "choices": choices, "is_public": True}
    return field(default=default, metadata=metadata)


def require_whole_steps(steps: int | None, num_blocks: int) -> None:
    """Raise RequestError where steps over the whole canvas do not divide over its blocks."""
    if steps is not None and steps % num_blocks:
        raise RequestError(
            f"steps {steps} is not a multiple of the canvas's {num_blocks} blocks",
            field="algorithm_parameters.steps",
            value=steps,
            limit=num_blocks,
        )
