"""What a step needs from the logits, in one chunked pass over the positions that can still change.

Letters: M packed positions of all rows, m positions of a chunk, V vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sfumato.models.placing import placed
from sfumato.text.host_copies import HostCopies
from sfumato.text.read_once import is_read_once, keeps_dtype, read_once, rows_at_once
from sfumato.text.sampling import probability_of
from sfumato.text.transform import Head, Piece, Reading, chosen_tokens, processed_logits, transformed_logits


@dataclass(frozen=True, slots=True)
class PackedStatistics:
    """token i64[M], confidence f32[M], is_finite bool[M], in the readings' order.

    best i64[M], entropy, margin f32[M]: filled where wanted. logprob f32[M], of the token: filled where any
    row asked for log probabilities. top_ids, top_logprobs: [M, K] where any row asked for alternatives.
    soft_embedding: [M, width] where any row wanted it. asked_logprobs: [M, K] where any row named tokens.
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

    def on_host(self, copies: HostCopies) -> PackedStatistics:
        """Return it with what the host may read of it there."""
        if self.top_ids is None and self.asked_logprobs is None:
            return replace(self, is_finite=copies.take(self.is_finite))
        return replace(
            self,
            token=copies.take(self.token),
            is_finite=copies.take(self.is_finite),
            logprob=copies.take(self.logprob),
            top_ids=copies.take_if(self.top_ids),
            top_logprobs=copies.take_if(self.top_logprobs),
            asked_logprobs=copies.take_if(self.asked_logprobs),
        )


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
    wants_top = any(reading.width or reading.num_alternatives is not None for reading in readings)
    width = max((reading.width for reading in readings), default=0) if wants_top else None
    limits = max(1, chunk_bytes // (4 * vocab_size)), rows_at_once(chunk_bytes, vocab_size, hidden.dtype)
    parts = [
        _read_chunk_once(hidden, head, pieces) if once else _read_chunk(hidden, head, embed, pieces, width)
        for once, pieces in _chunks(readings, hidden, limits)
    ]
    return _join(parts, hidden.device)


def _chunks(
    readings: Sequence[Reading], hidden: Tensor, limits: tuple[int, int]
) -> Iterator[tuple[bool, list[Piece]]]:
    """Yield pieces that one call reads, in order, and whether kernels read them once.

    limits: rows of a call, without kernels and with them.
    """
    pieces: list[Piece] = []
    size, kind = 0, (False, False)
    for reading in readings:
        once = is_read_once(reading, hidden)
        per_chunk = limits[once]
        for first in range(0, len(reading.positions), per_chunk):
            piece = Piece(reading, first, min(first + per_chunk, len(reading.positions)))
            if pieces and (size + piece.size > per_chunk or (once, piece.is_guided) != kind):
                yield kind[0], pieces
                pieces, size = [], 0
            kind = (once, piece.is_guided)
            pieces.append(piece)
            size += piece.size
    if pieces:
        yield kind[0], pieces


def _read_chunk_once(hidden: Tensor, head: Head, pieces: list[Piece]) -> PackedStatistics:
    found = read_once(transformed_logits(hidden, head, pieces, is_wide=not keeps_dtype(pieces)), pieces)
    return PackedStatistics(
        token=found.token,
        confidence=found.confidence,
        is_finite=found.is_finite,
        logprob=found.logprob,
        best=found.best,
        entropy=found.entropy,
        margin=found.margin,
        top_ids=None,
        top_logprobs=None,
        soft_embedding=None,
    )


def _read_chunk(
    hidden: Tensor, head: Head, embed: Head | None, pieces: list[Piece], width: int | None
) -> PackedStatistics:
    logits = transformed_logits(hidden, head, pieces)
    best, token = logits.max(-1)
    wants_logprobs = width is not None or any(piece.reading.asked_ids is not None for piece in pieces)
    # A pass of its own, for nothing where all probabilities are those after temperature and filters.
    has_total = wants_logprobs or not all(piece.reading.is_measured_apart for piece in pieces)
    total = logits.logsumexp(-1) if has_total else torch.zeros_like(best)
    confidence = (best - total).exp()
    entropy, margin = torch.zeros_like(confidence), torch.zeros_like(confidence)
    is_finite = torch.zeros_like(confidence, dtype=torch.bool)
    best_token = token.clone() if any(piece.reading.wanted.best for piece in pieces) else token
    soft: list[Tensor | None] = []
    start = 0
    for piece in pieces:
        span = slice(start, start + piece.size)
        start += piece.size
        reading, processed = piece.reading, logits[span]
        recorded = reading.random_source.tokens(reading.block, reading.step, piece.positions)
        is_processed = not reading.is_plain or recorded is not None
        if is_processed:
            processed = processed_logits(logits[span], piece)
            token[span] = chosen_tokens(processed, piece, recorded)
        probabilities = None
        if reading.wanted.distribution:
            probabilities, entropy[span] = _distribution(processed)
            if reading.wanted.margin:
                pair = probabilities.topk(2, dim=-1).values
                margin[span] = pair[:, 0] - pair[:, 1]
        if is_processed and not reading.transform.filtered_confidence:
            confidence[span] = (_at(logits[span], token[span]) - total[span]).exp()
        elif is_processed and probabilities is not None:
            confidence[span] = _at(probabilities, token[span])
        elif is_processed:
            confidence[span] = probability_of(processed, token[span])
        is_finite[span] = confidence[span].isfinite()
        if reading.transform.confidence_excluded_ids:
            confidence[span] = _confidence_without(
                logits[span], token[span], reading.transform.confidence_excluded_ids
            )
        soft.append(None)
        if reading.wanted.soft_embedding and embed is not None and probabilities is not None:
            soft[-1] = embed(probabilities)
    logprob = _at(logits, token) - total if has_total else torch.zeros_like(confidence)
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


def _at(values: Tensor, tokens: Tensor) -> Tensor:
    """Return [m], the value of one token of each position [m, V]."""
    return values.gather(-1, tokens[:, None]).squeeze(-1)


def _distribution(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities [m, V] and their entropies [m] in nats."""
    logarithms = logits.log_softmax(-1)
    probabilities = logarithms.exp()
    # What is excluded adds nothing: zero times the least number, not times minus infinity.
    least = torch.finfo(logarithms.dtype).min
    return probabilities, logarithms.clamp_(min=least).mul_(probabilities).sum(-1).neg_()


def _asked(logits: Tensor, total: Tensor, pieces: list[Piece]) -> Tensor | None:
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
    return logits.gather(-1, placed(ids, logits.device).clamp(min=0)) - total[:, None]


def _soft(parts: list[Tensor | None], pieces: list[Piece]) -> Tensor | None:
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
    return PackedStatistics(
        token=torch.cat([part.token for part in parts]),
        confidence=torch.cat([part.confidence for part in parts]),
        is_finite=torch.cat([part.is_finite for part in parts]),
        logprob=torch.cat([part.logprob for part in parts]),
        best=torch.cat([part.best for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
        margin=torch.cat([part.margin for part in parts]),
        top_ids=_cat_ragged([part.top_ids for part in parts], parts),
        top_logprobs=_cat_ragged([part.top_logprobs for part in parts], parts),
        soft_embedding=_cat_ragged([part.soft_embedding for part in parts], parts),
        asked_logprobs=_cat_ragged([part.asked_logprobs for part in parts], parts),
    )


def _cat_ragged(found: list[Tensor | None], parts: list[PackedStatistics]) -> Tensor | None:
    """Join [m, K] of different K, filled with zeros; None where no part has any."""
    samples = [one for one in found if one is not None]
    width = max((one.shape[1] for one in samples), default=0)
    if not width:
        return None
    joined = samples[0].new_zeros(sum(len(part.token) for part in parts), width)
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
