"""What a step needs from the logits, in one chunked pass over the positions that can still change.

Letters: M packed positions of all rows, m positions of a chunk, V vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.spec import Sampling
from sfumato.text.decoding.protocol import Transform, Wanted
from sfumato.text.random_source import RandomSource
from sfumato.text.sampling import probability_of, scale_and_filter

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Reading:
    """The positions of one row that are read, and how.

    positions: i64[m] on the canvas. hidden_rows: i64[m] of the packed hidden states; guided_rows: those of
    the unconditional branch, or None. previous_ids: i64[m], the token to the left, -1 for none, where it is
    penalised. excluded_ids: never chosen. num_alternatives: for log probabilities. asked_ids: i64[m, K],
    tokens whose log probabilities are wanted, -1 for none. own_ids: i64[m], the token that each position
    shows, where own_penalty is taken off its logit. even_share: of the probabilities that is spread evenly.
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

    @property
    def width(self) -> int:
        """Return how many alternatives are read, K: for log probabilities the best one at least."""
        return max(0 if self.num_alternatives is None else max(1, self.num_alternatives), self.wanted.top)

    @property
    def is_plain(self) -> bool:
        """Whether the best token of the logits as they are is taken."""
        return self.sampling.is_greedy and not self.transform.filters_greedy


@dataclass(frozen=True, slots=True)
class PackedStatistics:
    """token i64[M], confidence f32[M], is_finite bool[M], logprob f32[M], in the readings' order.

    best i64[M], entropy, margin f32[M]: filled where wanted. top_ids, top_logprobs: [M, K] where any row
    asked for alternatives. soft_embedding: [M, width] where any row wanted it. asked_logprobs: [M, K] where
    any row named tokens.
    """

    token: Tensor
    confidence: Tensor
    is_finite: Tensor
    logprob: Tensor
    best: Tensor
    entropy: Tensor
    margin: Tensor
    top_ids: Tensor | None
    top_logprobs: Tensor | None
    soft_embedding: Tensor | None
    asked_logprobs: Tensor | None = None


def compute_statistics(
    hidden: Tensor,
    head: Head,
    readings: Sequence[Reading],
    *,
    vocab_size: int,
    chunk_bytes: int,
    embed: Head | None = None,
) -> PackedStatistics:
    """Read the logits of every reading; no float32 temporary is larger than about chunk_bytes.

    hidden: [N, width] packed hidden states. embed: probabilities [m, V] to embeddings [m, width].
    """
    per_chunk = max(1, chunk_bytes // (4 * vocab_size))
    pieces: list[_Piece] = []
    parts: list[PackedStatistics] = []
    wants_top = any(reading.width or reading.num_alternatives is not None for reading in readings)
    width = max((reading.width for reading in readings), default=0) if wants_top else None
    size = 0
    for reading in readings:
        for first in range(0, len(reading.positions), per_chunk):
            piece = _Piece(reading, first, min(first + per_chunk, len(reading.positions)))
            if pieces and (size + piece.size > per_chunk or piece.is_guided != pieces[0].is_guided):
                parts.append(_read_chunk(hidden, head, embed, pieces, width))
                pieces, size = [], 0
            pieces.append(piece)
            size += piece.size
    if pieces:
        parts.append(_read_chunk(hidden, head, embed, pieces, width))
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


def _read_chunk(
    hidden: Tensor, head: Head, embed: Head | None, pieces: list[_Piece], width: int | None
) -> PackedStatistics:
    logits = _logits(hidden, head, pieces)
    _exclude(logits, pieces)
    best, token = logits.max(-1)
    total = logits.logsumexp(-1)
    is_finite = total.isfinite()
    confidence = (best - total).exp()
    entropy, margin = torch.zeros_like(confidence), torch.zeros_like(confidence)
    best_token = token.clone() if any(piece.reading.wanted.best for piece in pieces) else token
    soft: list[Tensor | None] = []
    start = 0
    for piece in pieces:
        span = slice(start, start + piece.size)
        start += piece.size
        reading, processed = piece.reading, logits[span]
        recorded = reading.random_source.tokens(reading.block, reading.step, piece.positions)
        if not reading.is_plain or recorded is not None:
            processed = _process(logits[span], piece)
            token[span] = _choose(processed, piece, recorded)
            measured = processed if reading.transform.filtered_confidence else logits[span]
            confidence[span] = probability_of(measured, token[span])
        if reading.transform.confidence_excluded_ids:
            confidence[span] = _confidence_without(
                logits[span], token[span], reading.transform.confidence_excluded_ids
            )
        if reading.wanted.entropy or reading.wanted.margin or reading.wanted.soft_embedding:
            probabilities = processed.softmax(-1)
            entropy[span] = torch.special.entr(probabilities).sum(-1)
            if reading.wanted.margin:
                pair = probabilities.topk(2, dim=-1).values
                margin[span] = pair[:, 0] - pair[:, 1]
            if reading.wanted.soft_embedding and embed is not None:
                soft.append(embed(probabilities))
                continue
        soft.append(None)
    logprob = logits.gather(-1, token[:, None]).squeeze(-1) - total
    top_ids = top_logprobs = None
    if width is not None:
        top = logits.topk(min(width, logits.shape[-1]), dim=-1)
        top_ids, top_logprobs = top.indices, top.values - total[:, None]
    return PackedStatistics(
        token=token,
        confidence=confidence,
        is_finite=is_finite,
        logprob=logprob,
        best=best_token,
        entropy=entropy,
        margin=margin,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        soft_embedding=_soft(soft, pieces),
        asked_logprobs=_asked(logits, total, pieces),
    )


def _asked(logits: Tensor, total: Tensor, pieces: list[_Piece]) -> Tensor | None:
    """Return the log probabilities [m, K] of the tokens that the pieces name."""
    width = max(
        (0 if p.reading.asked_ids is None else p.reading.asked_ids.shape[1] for p in pieces), default=0
    )
    if not width:
        return None
    ids = np.full((len(total), width), -1, dtype=np.int64)
    start = 0
    for piece in pieces:
        if piece.reading.asked_ids is not None:
            asked = piece.reading.asked_ids[piece.start : piece.stop]
            ids[start : start + piece.size, : asked.shape[1]] = asked
        start += piece.size
    return logits.gather(-1, torch.from_numpy(ids).to(logits.device).clamp(min=0)) - total[:, None]


def _soft(parts: list[Tensor | None], pieces: list[_Piece]) -> Tensor | None:
    """Return [m, width], zeros where a piece wants none; None where none does."""
    sample = next((part for part in parts if part is not None), None)
    if sample is None:
        return None
    return torch.cat(
        [
            sample.new_zeros(piece.size, sample.shape[-1]) if part is None else part
            for part, piece in zip(parts, pieces, strict=True)
        ]
    )


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
        span = slice(start, start + piece.size)
        start += piece.size
        bias = piece.reading.sampling.logit_bias
        if bias:
            ids = torch.tensor(list(bias), device=logits.device)
            logits[span, ids] += torch.tensor(list(bias.values()), device=logits.device)
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
    return logits


def _penalise(logits: Tensor, previous_ids: NDArray[np.int64], penalty: float) -> None:
    """Take the penalty off each position's logit of the token to its left; -1 is no token. In place."""
    at = np.flatnonzero(previous_ids >= 0)
    rows, ids = torch.from_numpy(at).to(logits.device), torch.from_numpy(previous_ids[at]).to(logits.device)
    logits[rows, ids] -= penalty


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


def _process(logits: Tensor, piece: _Piece) -> Tensor:
    """Return a piece's logits after temperature and filters."""
    sampling, transform = piece.reading.sampling, piece.reading.transform
    return scale_and_filter(
        logits,
        temperature=sampling.temperature or 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        top_p_first=transform.top_p_first,
    )


def _choose(processed: Tensor, piece: _Piece, recorded: NDArray[np.int64] | None) -> Tensor:
    """Return tokens i64[m]: recorded ones, the best, or drawn ones."""
    reading = piece.reading
    if recorded is not None:
        return torch.from_numpy(recorded).to(processed.device)
    if reading.sampling.is_greedy:
        return processed.argmax(-1)
    noise = reading.random_source.gumbel(reading.block, reading.step, piece.positions, processed.shape[-1])
    return (processed + noise.to(processed.device)).argmax(-1)


def _confidence_without(logits: Tensor, token: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Return probabilities among the other tokens; a position that chose one of `ids` has none."""
    left = logits.clone()
    left[:, list(ids)] = -torch.inf
    return probability_of(left, token)


def _join(parts: list[PackedStatistics], device: torch.device) -> PackedStatistics:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return _blank(0, device)
    softs = [part.soft_embedding for part in parts]
    sample = next((soft for soft in softs if soft is not None), None)
    if sample is not None:
        softs = [
            sample.new_zeros(len(part.token), sample.shape[-1]) if soft is None else soft
            for part, soft in zip(parts, softs, strict=True)
        ]
    return PackedStatistics(
        token=torch.cat([part.token for part in parts]),
        confidence=torch.cat([part.confidence for part in parts]),
        is_finite=torch.cat([part.is_finite for part in parts]),
        logprob=torch.cat([part.logprob for part in parts]),
        best=torch.cat([part.best for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
        margin=torch.cat([part.margin for part in parts]),
        top_ids=_cat([part.top_ids for part in parts]),
        top_logprobs=_cat([part.top_logprobs for part in parts]),
        soft_embedding=_cat(softs),
        asked_logprobs=_cat_ragged([part.asked_logprobs for part in parts], parts),
    )


def _cat_ragged(found: list[Tensor | None], parts: list[PackedStatistics]) -> Tensor | None:
    """Join [m, K] of different K, filled with zeros."""
    width = max((one.shape[1] for one in found if one is not None), default=0)
    if not width:
        return None
    joined = parts[0].logprob.new_zeros(sum(len(part.token) for part in parts), width)
    start = 0
    for one, part in zip(found, parts, strict=True):
        if one is not None:
            joined[start : start + len(part.token), : one.shape[1]] = one
        start += len(part.token)
    return joined


def nothing_read(device: torch.device) -> PackedStatistics:
    """Return one position's statistics that say nothing, to index where no position was read."""
    return _blank(1, device)


def _blank(size: int, device: torch.device) -> PackedStatistics:
    zeros = torch.zeros(size, device=device)
    ids = zeros.long()
    return PackedStatistics(ids, zeros, ~zeros.bool(), zeros, ids, zeros, zeros, None, None, None)


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None
