"""The rows of a forward as bytes, for ranks that make the same forward without knowing any request."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from sfumato.core.plan import Row
from sfumato.text.batching import FedRow


class _Fed(msgspec.Struct, frozen=True, array_like=True):
    """A FedRow: token_ids i64[N] and addend f32[N, width] as bytes."""

    row: Row
    token_ids: bytes
    pages: list[int] | None
    block_length: int
    addend: bytes | None


class Order(msgspec.Struct, frozen=True, array_like=True):
    """One forward: its rows, output_tokens i64[P] as bytes, and in which of the stores its keys lie.

    forgotten: stores that are used no more.
    """

    fed: list[_Fed]
    output_tokens: bytes
    store: int
    page_size: int
    num_slots: int
    forgotten: list[int]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Order)


def write_order(
    fed: Sequence[FedRow],
    output_tokens: NDArray[np.int64],
    *,
    store: int,
    page_size: int,
    num_slots: int,
    forgotten: Sequence[int],
) -> bytes:
    """Return an order. Embeddings that rows carry are sent in float32, which holds those of any dtype."""
    rows = [
        _Fed(
            item.row,
            np.ascontiguousarray(item.token_ids, dtype=np.int64).tobytes(),
            None if item.pages is None else [int(page) for page in item.pages],
            item.block_length,
            None if item.addend is None else item.addend.float().cpu().contiguous().numpy().tobytes(),
        )
        for item in fed
    ]
    output = np.ascontiguousarray(output_tokens, dtype=np.int64).tobytes()
    return _encoder.encode(Order(rows, output, store, page_size, num_slots, list(forgotten)))


def read_order(content: bytes) -> Order:
    """Return what was written."""
    return _decoder.decode(content)


def fed_rows(order: Order, *, width: int, device: torch.device) -> list[FedRow]:
    """Return an order's rows; width: of the embeddings that they may carry."""
    rows = []
    for item in order.fed:
        addend = None
        if item.addend is not None:
            values = np.frombuffer(item.addend, dtype=np.float32).reshape(-1, width).copy()
            addend = torch.from_numpy(values).to(device)
        token_ids = np.frombuffer(item.token_ids, dtype=np.int64)
        rows.append(FedRow(item.row, token_ids.copy(), item.pages, item.block_length, addend))
    return rows


def output_tokens(order: Order) -> NDArray[np.int64]:
    """Return the packed tokens i64[P] whose hidden states are wanted."""
    return np.frombuffer(order.output_tokens, dtype=np.int64).copy()
