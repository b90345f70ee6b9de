"""What a decoding algorithm is given and what it answers.

Letters: R rows of one algorithm, W window positions (rows of shorter windows are padded with positions that
are neither eligible nor editable), K alternatives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.cache.approximate import Reuse
from sfumato.core.spec import TextSpec
from sfumato.core.traits import ModelTraits
from sfumato.errors import NotSupported, RequestError
from sfumato.models.placing import placed
from sfumato.text.canvas import Canvas
from sfumato.text.walk import Walk, block_walk


@dataclass(frozen=True, slots=True)
class View:
    """The open windows of R rows.

    token_ids: i64[R, W], as they were fed. eligible, editable: bool[R, W]; eligible positions may be decided
    now, editable ones are decided, not pinned and may change. focus: bool[R, W], a span that must progress.
    is_given: bool[R, W], what the request brought.
    step: i64[R] steps the block has taken. masks_at_start: i64[R] undecided positions when the block opened.
    block_length, num_blocks, mask_token_id: per row. uniform: f32[R, W] random numbers, vocabulary: i64[R, W]
    random tokens, where an algorithm asks for them. routes: i64[R, W] recorded choices in place of chance, -1
    for none.
    """

    token_ids: Tensor
    eligible: Tensor
    editable: Tensor
    focus: Tensor
    is_given: Tensor
    step: Tensor
    masks_at_start: Tensor
    block_length: Sequence[int]
    num_blocks: Sequence[int]
    mask_token_id: Sequence[int] = ()
    vocab_size: int = 0
    uniform: Tensor | None = None
    vocabulary: Tensor | None = None
    routes: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the logits say: token i64[R, W], best or sampled; confidence f32[R, W], its probability.

    Where an algorithm wants them, else None: best i64[R, W], the best token where `token` is a sampled one;
    entropy f32[R, W] in nats; margin f32[R, W], the best probability less the next; top_ids i64[R, W, K] and
    top_probabilities f32[R, W, K], best first; soft_embedding [R, W, width]; asked_logprobs f32[R, W, K], the
    log probabilities of the tokens that `asked_ids` names.
    """

    token: Tensor
    confidence: Tensor
    best: Tensor | None = None
    entropy: Tensor | None = None
    margin: Tensor | None = None
    top_ids: Tensor | None = None
    top_probabilities: Tensor | None = None
    soft_embedding: Tensor | None = None
    asked_logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """transfer: bool[R, W] positions that take their token now. tokens: i64[R, W].

    renoised: i64[R, W] what the other eligible positions show from now on; None: what they showed.
    done: bool[R] ends the block now; None: it ends when nothing is undecided. states: one per row.
    """

    transfer: Tensor
    tokens: Tensor
    renoised: Tensor | None = None
    done: Tensor | None = None
    states: Sequence[Any] | None = None


@dataclass(frozen=True, slots=True)
class Transform:
    """What is done to a row's logits before its statistics.

    guidance_scale: (s + 1) cond - s uncond where not 0. excluded_ids: never chosen.
    confidence_excluded_ids: left out of the probabilities; a position whose token is one has confidence 0.
    filtered_confidence: probabilities after temperature and filters instead of the model's own.
    filters_greedy: the filters count at temperature 0 too. top_p_first: top-p before top-k.
    repeat_penalty: taken off the logit of the token that stands one position to the left in the window.
    """

    guidance_scale: float = 0.0
    excluded_ids: tuple[int, ...] = ()
    confidence_excluded_ids: tuple[int, ...] = ()
    filtered_confidence: bool = False
    filters_greedy: bool = False
    top_p_first: bool = False
    repeat_penalty: float = 0.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """Statistics beyond token and confidence; top: how many alternatives, 0 for none."""

    best: bool = False
    entropy: bool = False
    margin: bool = False
    soft_embedding: bool = False
    top: int = 0

    @property
    def distribution(self) -> bool:
        """Whether the probabilities of all tokens are needed."""
        return self.entropy or self.margin or self.soft_embedding


class Algorithm(ABC):
    """A decoding algorithm with its parameters: a frozen value; what most have in common is the default here.

    is_monotone: a decided position never changes again, so it may be streamed at once.
    reads_decided: statistics of decided, unpinned positions are needed too.
    spans_canvas: all of a canvas is one block, whatever block length was asked for.
    renoises: undecided positions show random tokens, for models without a mask token.
    runs_ahead: its next step can begin before the host knows what this one decides: its state is None or a
    tensor. obeys_grammars: of its decisions, some may be left out. decides_at_end: a block is decided by the
    step that ends it, or, where some of that is left out, by those behind it.
    """

    __slots__ = ()

    is_monotone: ClassVar[bool] = True
    reads_decided: ClassVar[bool] = False
    spans_canvas: ClassVar[bool] = False
    renoises: ClassVar[bool] = False
    runs_ahead: ClassVar[bool] = False
    obeys_grammars: ClassVar[bool] = True
    decides_at_end: ClassVar[bool] = False

    @property
    def needs_uniform(self) -> bool:
        """Whether `View.uniform` must be filled for this row."""
        return False

    @property
    def scheduled_steps(self) -> int | None:
        """Return how many denoise steps a schedule gives the whole canvas; None: the model decides."""
        return None

    @property
    def needs_vocabulary(self) -> bool:
        """Whether `View.vocabulary` must be filled for this row."""
        return False

    @property
    def wanted(self) -> Wanted:
        """Return which statistics this row's decisions need."""
        return Wanted()

    def wanted_at(self, step: int) -> Wanted:
        """Return those that are needed in a block's step number `step`, from 0."""
        return self.wanted

    def asked_ids(self, token_ids: NDArray[np.int64], state: Any) -> NDArray[np.int64] | None:
        """Return tokens i64[W, K] whose log probabilities the next step needs, -1 for none."""
        return None

    def addend(self, state: Any) -> Tensor | None:
        """Return the expected embeddings [W, width] that the next forward adds to its input, if any."""
        return None

    def walk(self, canvas: Canvas, spec: TextSpec, traits: ModelTraits) -> Walk:
        """Return how a request's canvas is gone through, at its start."""
        return block_walk(traits)

    def transform(self, ends: tuple[int, ...], eot: int | None) -> Transform:
        """Return the transform of this row's logits, given the model's end tokens."""
        return Transform()

    def check(self, *, block_length: int, num_blocks: int, is_bidirectional: bool) -> None:  # noqa: B027
        """Raise RequestError where the parameters do not fit the request's canvas or model."""

    @staticmethod
    @abstractmethod
    def decide(rows: Sequence[Any], view: View, statistics: Statistics, states: Sequence[Any]) -> Outcome:
        """Choose positions for R rows at once, each by its own parameters."""


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


def cache_parameter(*offered: Reuse) -> Any:
    """Declare which old keys are reused, the first one offered by default; nothing named: all, none first."""
    choices = offered or tuple(Reuse)
    return parameter(
        choices[0].value,
        "which keys of a block's first forward are reused: those in front of it, or also those behind it",
        choices=tuple(reuse.value for reuse in choices),
    )


def check_cache(cache: str, is_bidirectional: bool) -> None:
    """Raise NotSupported where an exact cache needs no approximate one."""
    if cache != Reuse.NOTHING:
        require_bidirectional("cache", cache, is_bidirectional)


def planned_steps(rows: Sequence[Any], view: View) -> Tensor:
    """Return i64[R]: a schedule's steps per block; `steps` is over the canvas, None is one a token."""
    return per_row(
        (
            row.steps // blocks if row.steps else length
            for row, blocks, length in zip(rows, view.num_blocks, view.block_length, strict=True)
        ),
        view,
    )


def require_whole_steps(steps: int | None, num_blocks: int) -> None:
    """Raise RequestError where steps over the whole canvas do not divide over its blocks."""
    if steps is not None and steps % num_blocks:
        raise RequestError(
            f"steps {steps} is not a multiple of the canvas's {num_blocks} blocks",
            field="algorithm_parameters.steps",
            value=steps,
            limit=num_blocks,
        )


def soft_states(statistics: Statistics, view: View) -> list[Tensor | None]:
    """Return each row's expected embeddings [block, width] as its state, where the model wants them."""
    soft = statistics.soft_embedding
    return [None if soft is None else soft[row, :length] for row, length in enumerate(view.block_length)]


def per_row(values: Iterable[Any], view: View) -> Tensor:
    """Return one value per row as a tensor [R] beside the view's."""
    return placed(list(values), view.step.device)


def counts(states: Sequence[Any], view: View) -> Tensor:
    """Return states that are numbers, None for 0, as i64[R]."""
    zero = view.step.new_zeros(())
    return torch.stack([zero if state is None else torch.as_tensor(state).to(zero) for state in states])


def require_bidirectional(name: str, value: object, is_bidirectional: bool) -> None:
    """Raise NotSupported where a parameter means nothing to a model with an exact cache."""
    if not is_bidirectional:
        raise NotSupported(
            f"{name} {value!r} needs a model with bidirectional attention",
            field=f"algorithm_parameters.{name}",
            value=value,
        )
