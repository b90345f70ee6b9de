"""Statistics of rows whose logits are read once, by kernels: which rows those are, and how they are told to.

Letters: m positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.models.kernels import run_on
from sfumato.models.placing import placed
from sfumato.text.transform import Piece, Reading


@dataclass(frozen=True, slots=True)
class ReadOnce:
    """token, best: i64[m]; is_finite: bool[m]; the others f32[m]."""

    token: Tensor
    best: Tensor
    confidence: Tensor
    is_finite: Tensor
    logprob: Tensor
    entropy: Tensor
    margin: Tensor


def is_read_once(reading: Reading, hidden: Tensor) -> bool:
    """Whether kernels say all that a reading wants: on a GPU, unless it asks for more than they keep.

    Alternatives, tokens that are asked about, expected embeddings and probabilities among some tokens alone
    need all logits again; recorded draws are a replay's. Guidance, biases, penalties and grammars change the
    logits before, whoever reads them then.
    """
    wants_more = (
        reading.width > 0
        or reading.num_alternatives is not None
        or reading.asked_ids is not None
        or reading.wanted.soft_embedding
        or bool(reading.transform.confidence_excluded_ids)
    )
    if wants_more or not run_on(hidden):
        return False
    source, place = reading.random_source, (reading.block, reading.step, reading.positions)
    if source.tokens(*place) is not None:
        return False
    return reading.sampling.is_greedy or source.token_keys(*place) is not None


def read_once(logits: Tensor, pieces: list[Piece]) -> ReadOnce:
    """Read a chunk's logits [m, V], of any float dtype, after guidance, biases and exclusions."""
    # Here, because triton need not be installed where nothing runs on a GPU.
    from sfumato.text.kernels.filters import cut_rows
    from sfumato.text.kernels.reading import IS_DRAWN, IS_MEASURED_APART, IS_PROCESSED, RowModes, read_rows

    device, sizes = logits.device, [piece.size for piece in pieces]
    readings = [piece.reading for piece in pieces]
    modes = [
        IS_PROCESSED * (not reading.is_plain)
        | IS_DRAWN * (not reading.sampling.is_greedy)
        | IS_MEASURED_APART * reading.is_measured_apart
        for reading in readings
    ]
    numbers = _repeated(
        [
            modes,
            [0 if reading.is_plain else reading.sampling.top_k for reading in readings],
            [int(reading.transform.top_p_first) for reading in readings],
        ],
        sizes,
        np.int32,
    )
    shares = _repeated(
        [
            [1.0 if reading.is_plain else reading.sampling.temperature or 1.0 for reading in readings],
            [1.0 if reading.is_plain else reading.sampling.top_p for reading in readings],
        ],
        sizes,
        np.float32,
    )
    mode, top_k, top_p_first = placed(numbers, device)
    temperature, top_p = placed(shares, device)
    cut = last = None
    if bool(((numbers[1] > 0) | (shares[1] < 1.0)).any()):
        cut, last = cut_rows(logits, temperature, top_k, top_p, top_p_first)
    has_noise = any(bits & IS_DRAWN for bits in modes)
    found = read_rows(
        logits,
        RowModes(
            mode=mode,
            temperature=temperature,
            key=placed(np.concatenate([_keys(piece) for piece in pieces]), device),
            cut=cut,
            last=last,
            has_processed=any(bits & IS_PROCESSED for bits in modes),
            has_noise=has_noise,
        ),
    )
    return ReadOnce(
        token=found.token,
        best=found.best,
        confidence=found.confidence,
        is_finite=found.confidence.isfinite(),
        logprob=found.logprob,
        entropy=found.entropy,
        margin=found.margin,
    )


def _keys(piece: Piece) -> NDArray[np.int64]:
    """Return the keys of each position's noise, zeros where none is drawn."""
    reading = piece.reading
    if reading.sampling.is_greedy:
        return np.zeros(piece.size, dtype=np.int64)
    keys = reading.random_source.token_keys(reading.block, reading.step, piece.positions)
    assert keys is not None
    return keys


def _repeated(
    values: list[list[float]] | list[list[int]], sizes: list[int], dtype: type
) -> NDArray[np.generic]:
    """Return [len(values), m], each piece's value for each of its positions."""
    return np.repeat(np.asarray(values, dtype=dtype), sizes, axis=1)


def keeps_dtype(pieces: list[Piece]) -> bool:
    """Whether a chunk's logits are read as the head gives them: nothing but exclusions changes them."""
    return not any(
        piece.is_guided
        or piece.reading.sampling.logit_bias
        or piece.reading.previous_ids is not None
        or piece.reading.own_ids is not None
        or piece.reading.even_share
        for piece in pieces
    )


def rows_at_once(chunk_bytes: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Return how many rows a head's product may have: no float32 copy of them exists.

    Each product reads all of the head's weights, so that it is worth more memory than a copy in float32.
    """
    return max(1, _MORE * chunk_bytes // (dtype.itemsize * vocab_size))


# Chunks that the pass in torch would have made, in one.
_MORE = 8
