"""What a step needs from the logits, in one chunked pass over the positions that can still change.

Letters: M packed positions of all rows, V vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.spec import Sampling
from sfumato.text.decoding.protocol import Transform
from sfumato.text.random_source import RandomSource
from sfumato.text.sampling import probability_of, scale_and_filter

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Reading:
    """The positions of one row that are read, and how.

    positions: i64[m] on the canvas. hidden_rows: i64[m] of the packed hidden states; guided_rows: those of
    the unconditional branch, or None. excluded_ids: never chosen. num_alternatives: for log probabilities.
    """

    positions: NDArray[np.int64]
    hidden_rows: NDArray[np.int64]
    sampling: Sampling
    transform: Transform
    random_source: RandomSource
    block: int
    step: int
    excluded_ids: tuple[int, ...] = ()
    num_alternatives: int | None = None
    guided_rows: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class PackedStatistics:
    """token i64[M], confidence f32[M], is_finite bool[M], logprob f32[M], in the readings' order.

    top_ids, top_logprobs: [M, K] where any row asked for alternatives.
    """

    token: Tensor
    confidence: Tensor
    is_finite: Tensor
    logprob: Tensor
    top_ids: Tensor | None
    top_logprobs: Tensor | None


def compute_statistics(
    hidden: Tensor, head: Head, readings: Sequence[Reading], *, vocab_size: int, chunk_bytes: int
) -> PackedStatistics:
    """Read the logits of every reading; no float32 temporary is larger than about chunk_bytes.

    hidden: [N, width] packed hidden states.
    """
    per_chunk = max(1, chunk_bytes // (4 * vocab_size))
    pieces: list[_Piece] = []
    parts: list[PackedStatistics] = []
    width = max((reading.num_alternatives or 0 for reading in readings), default=0)
    wants_logprobs = any(reading.num_alternatives is not None for reading in readings)
    size = 0
    for reading in readings:
        for first in range(0, len(reading.positions), per_chunk):
            piece = _Piece(reading, first, min(first + per_chunk, len(reading.positions)))
            if pieces and (size + piece.size > per_chunk or piece.is_guided != pieces[0].is_guided):
                parts.append(_read_chunk(hidden, head, pieces, width if wants_logprobs else None))
                pieces, size = [], 0
            pieces.append(piece)
            size += piece.size
    if pieces:
        parts.append(_read_chunk(hidden, head, pieces, width if wants_logprobs else None))
    return _join(parts, hidden.device)


@dataclass(frozen=True, slots=True)
class _Piece:
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


def _read_chunk(hidden: Tensor, head: Head, pieces: list[_Piece], width: int | None) -> PackedStatistics:
    logits = _logits(hidden, head, pieces)
    _exclude(logits, pieces)
    best, token = logits.max(-1)
    total = logits.logsumexp(-1)
    is_finite = total.isfinite()
    confidence = (best - total).exp()
    start = 0
    for piece in pieces:
        span = slice(start, start + piece.size)
        start += piece.size
        reading = piece.reading
        if (
            not reading.sampling.is_greedy
            or reading.random_source.tokens(reading.block, reading.step, piece.positions) is not None
        ):
            token[span], confidence[span] = _sample(logits[span], total[span], piece)
        if reading.transform.confidence_excluded_ids:
            confidence[span] = _confidence_without(
                logits[span], token[span], reading.transform.confidence_excluded_ids
            )
    logprob = logits.gather(-1, token[:, None]).squeeze(-1) - total
    top_ids = top_logprobs = None
    if width is not None:
        top = logits.topk(min(width, logits.shape[-1]), dim=-1)
        top_ids, top_logprobs = top.indices, top.values - total[:, None]
    return PackedStatistics(token, confidence, is_finite, logprob, top_ids, top_logprobs)


def _logits(hidden: Tensor, head: Head, pieces: list[_Piece]) -> Tensor:
    """Return the chunk's logits f32[m, V] with guidance and biases added."""
    rows = np.concatenate([piece.reading.hidden_rows[piece.start : piece.stop] for piece in pieces])
    logits = head(hidden[torch.from_numpy(rows).to(hidden.device)]).float()
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
        uncond = head(hidden[torch.from_numpy(guided).to(hidden.device)]).float()
        scale = torch.from_numpy(scales).to(hidden.device)[:, None]
        logits = uncond + (scale + 1) * (logits - uncond)
    start = 0
    for piece in pieces:
        bias = piece.reading.sampling.logit_bias
        if bias:
            ids = torch.tensor(list(bias), device=logits.device)
            logits[start : start + piece.size, ids] += torch.tensor(list(bias.values()), device=logits.device)
        start += piece.size
    return logits


def _exclude(logits: Tensor, pieces: list[_Piece]) -> None:
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


def _sample(logits: Tensor, total: Tensor, piece: _Piece) -> tuple[Tensor, Tensor]:
    """Return tokens i64[m] and their probabilities f32[m] for one sampled piece."""
    reading, sampling = piece.reading, piece.reading.sampling
    temperature = sampling.temperature or 1.0
    filtered = scale_and_filter(logits, temperature=temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    recorded = reading.random_source.tokens(reading.block, reading.step, piece.positions)
    if recorded is not None:
        token = torch.from_numpy(recorded).to(logits.device)
    else:
        noise = reading.random_source.gumbel(reading.block, reading.step, piece.positions, logits.shape[-1])
        token = (filtered + noise.to(logits.device)).argmax(-1)
    if reading.transform.filtered_confidence:
        return token, probability_of(filtered, token)
    return token, (logits.gather(-1, token[:, None]).squeeze(-1) - total).exp()


def _confidence_without(logits: Tensor, token: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Return probabilities among the other tokens; a position that chose one of `ids` has none."""
    left = logits.clone()
    left[:, list(ids)] = -torch.inf
    return probability_of(left, token)


def _join(parts: list[PackedStatistics], device: torch.device) -> PackedStatistics:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        empty = torch.empty(0, device=device)
        return PackedStatistics(empty.long(), empty, empty.bool(), empty, None, None)
    has_top = parts[0].top_ids is not None
    return PackedStatistics(
        token=torch.cat([part.token for part in parts]),
        confidence=torch.cat([part.confidence for part in parts]),
        is_finite=torch.cat([part.is_finite for part in parts]),
        logprob=torch.cat([part.logprob for part in parts]),
        top_ids=_cat_top([part.top_ids for part in parts]) if has_top else None,
        top_logprobs=_cat_top([part.top_logprobs for part in parts]) if has_top else None,
    )


def _cat_top(parts: list[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])
