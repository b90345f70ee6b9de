"""How a row's logits are read, and what is done to them before: guidance, biases, exclusions, filters, noise.

Letters: m positions of a chunk, V vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.spec import Sampling
from sfumato.models.placing import placed
from sfumato.text.decoding.protocol import Transform, Wanted
from sfumato.text.random_source import RandomSource
from sfumato.text.sampling import scale_and_filter

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """A canvas position and the tokens bool[V] that may stand there."""

    position: int
    allowed: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Reading:
    """The positions of one row that are read, and how.

    positions: i64[m] on the canvas. hidden_rows: i64[m] of the packed hidden states; guided_rows: those of
    the unconditional branch, or None. previous_ids: i64[m], the token to the left, -1 for none, where it is
    penalised. excluded_ids: never chosen. num_alternatives: for log probabilities. asked_ids: i64[m, K],
    tokens whose log probabilities are wanted, -1 for none. own_ids: i64[m], the token that each position
    shows, where own_penalty is taken off its logit. even_share: of the probabilities that is spread evenly.
    frontier: a position at which a grammar allows some tokens alone.
    """

    positions: NDArray[np.int64]
    hidden_rows: NDArray[np.int64]
    sampling: Sampling
    transform: Transform
    random_source: RandomSource
    block: int
    step: int
    wanted: Wanted = Wanted()
    excluded_ids: tuple[int, ...] = ()
    num_alternatives: int | None = None
    guided_rows: NDArray[np.int64] | None = None
    previous_ids: NDArray[np.int64] | None = None
    asked_ids: NDArray[np.int64] | None = None
    own_ids: NDArray[np.int64] | None = None
    own_penalty: float = 0.0
    even_share: float = 0.0
    frontier: Frontier | None = None

    @property
    def width(self) -> int:
        """Return how many alternatives are read, K: for log probabilities the best one at least."""
        return max(0 if self.num_alternatives is None else max(1, self.num_alternatives), self.wanted.top)

    @property
    def is_plain(self) -> bool:
        """Whether the best token of the logits as they are is taken."""
        return self.sampling.is_greedy and not self.transform.filters_greedy

    @property
    def is_measured_apart(self) -> bool:
        """Whether probabilities are those after temperature and filters."""
        return not self.is_plain and self.transform.filtered_confidence


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions [start, stop) of one reading."""

    reading: Reading
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def is_guided(self) -> bool:
        return self.reading.guided_rows is not None

    @property
    def positions(self) -> NDArray[np.int64]:
        return self.reading.positions[self.start : self.stop]


def transformed_logits(hidden: Tensor, head: Head, pieces: list[Piece], *, is_wide: bool = True) -> Tensor:
    """Return the chunk's logits f32[m, V] with guidance, biases and exclusions.

    is_wide: False leaves them in the head's dtype, for pieces that only exclude tokens.
    """
    rows = np.concatenate([piece.reading.hidden_rows[piece.start : piece.stop] for piece in pieces])
    logits = head(hidden[placed(rows, hidden.device)])
    if is_wide:
        logits = logits.float()
    if pieces[0].is_guided:
        others = [piece.reading.guided_rows for piece in pieces]
        guided = np.concatenate(
            [
                rows[piece.start : piece.stop]
                for rows, piece in zip(others, pieces, strict=True)
                if rows is not None
            ]
        )
        scales = np.concatenate(
            [
                np.full(piece.size, piece.reading.transform.guidance_scale, dtype=np.float32)
                for piece in pieces
            ]
        )
        uncond = head(hidden[placed(guided, hidden.device)]).float()
        scale = placed(scales, hidden.device)[:, None]
        logits = uncond + (scale + 1) * (logits - uncond)
    start = 0
    for piece in pieces:
        span = slice(start, start + piece.size)
        start += piece.size
        bias = piece.reading.sampling.logit_bias
        if bias:
            ids = placed(list(bias), logits.device)
            logits[span, ids] += placed(list(bias.values()), logits.device)
        if piece.reading.previous_ids is not None:
            _penalise(
                logits[span],
                piece.reading.previous_ids[piece.start : piece.stop],
                piece.reading.transform.repeat_penalty,
            )
        if piece.reading.own_ids is not None:
            own_ids = piece.reading.own_ids[piece.start : piece.stop]
            _penalise(logits[span], own_ids, piece.reading.own_penalty)
        share = piece.reading.even_share
        if share:
            logits[span] = torch.log(logits[span].softmax(-1) * (1 - share) + share / logits.shape[-1])
    _exclude(logits, pieces)
    _obey(logits, pieces)
    return logits


def _obey(logits: Tensor, pieces: list[Piece]) -> None:
    """Leave at each grammar's frontier the tokens that it allows. In place."""
    start = 0
    for piece in pieces:
        frontier = piece.reading.frontier
        if frontier is not None:
            for row in np.flatnonzero(piece.positions == frontier.position):
                logits[start + int(row)].masked_fill_(~placed(frontier.allowed, logits.device), -torch.inf)
        start += piece.size


def _penalise(logits: Tensor, previous_ids: NDArray[np.int64], penalty: float) -> None:
    """Take the penalty off each position's logit of the token to its left; -1 is no token. In place."""
    at = np.flatnonzero(previous_ids >= 0)
    rows, ids = placed(at, logits.device), placed(previous_ids[at], logits.device)
    logits[rows, ids] -= penalty


def _exclude(logits: Tensor, pieces: list[Piece]) -> None:
    start = 0
    excluded = {(*piece.reading.excluded_ids, *piece.reading.transform.excluded_ids) for piece in pieces}
    if len(excluded) == 1:
        for token_id in excluded.pop():
            logits[:, token_id] = -torch.inf
        return
    for piece in pieces:
        for token_id in (*piece.reading.excluded_ids, *piece.reading.transform.excluded_ids):
            logits[start : start + piece.size, token_id] = -torch.inf
        start += piece.size


def processed_logits(logits: Tensor, piece: Piece) -> Tensor:
    """Return a piece's logits after temperature and filters."""
    sampling, transform = piece.reading.sampling, piece.reading.transform
    return scale_and_filter(
        logits,
        temperature=sampling.temperature or 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        top_p_first=transform.top_p_first,
    )


def chosen_tokens(processed: Tensor, piece: Piece, recorded: NDArray[np.int64] | None) -> Tensor:
    """Return tokens i64[m]: recorded ones, the best, or drawn ones."""
    reading = piece.reading
    if recorded is not None:
        return placed(recorded, processed.device)
    if reading.sampling.is_greedy:
        return processed.argmax(-1)
    noise = reading.random_source.gumbel(reading.block, reading.step, piece.positions, processed.shape[-1])
    return placed(noise, processed.device).add_(processed).argmax(-1)
