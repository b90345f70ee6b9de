"""The one place where rows become the tensors of a forward.

Letters: N packed tokens, L canvas positions, B block length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.plan import Row, RowKind
from sfumato.models.batch import Batch, KVStore, Segment, group_segments
from sfumato.text.canvas import Canvas


@dataclass(frozen=True, slots=True)
class FedRow:
    """A row with the canvas it is cut from and the pages that hold its keys and values."""

    row: Row
    canvas: Canvas
    pages: Sequence[int] | None


def make_batch(
    fed: Sequence[FedRow],
    *,
    output_tokens: NDArray[np.int64],
    store: KVStore | None,
    page_size: int,
    mask_token_id: int,
    device: torch.device | str,
) -> Batch:
    """Pack rows into one batch whose forward returns the hidden states of output_tokens, i64[P] packed.

    Rows with pages write their keys and values there and see the slots from position 0 to the end of each
    query's block; rows without see exactly themselves.
    """
    tokens, positions, segments = [], [], []
    write_slots: list[NDArray[np.int64]] = []
    write_tokens: list[NDArray[np.int64]] = []
    total = 0
    for item in fed:
        row, length = item.row, item.row.end - item.row.start
        tokens.append(_input_ids(item, mask_token_id))
        positions.append(np.arange(row.start, row.end))
        if item.pages is None:
            segments.append(Segment(start=total, length=length, key_slots=None, visible_end=None))
        else:
            slots = page_slots(item.pages, page_size, row.end)
            write_slots.append(slots[row.start :])
            write_tokens.append(np.arange(total, total + length))
            segments.append(
                Segment(
                    start=total,
                    length=length,
                    key_slots=torch.from_numpy(slots),
                    visible_end=_visible_end(row, item.canvas.block_length),
                )
            )
        total += length
    return Batch(
        token_ids=_tensor(tokens, device),
        positions=_tensor(positions, device),
        groups=group_segments(segments, device),
        store=store if write_slots else None,
        write_slots=_tensor(write_slots, device) if write_slots else None,
        write_tokens=_tensor(write_tokens, device) if write_tokens else None,
        output_tokens=_tensor([output_tokens], device),
    )


def _input_ids(item: FedRow, mask_token_id: int) -> NDArray[np.int64]:
    span = slice(item.row.start, item.row.end)
    ids = item.canvas.token_ids[span]
    if item.row.branch == "uncond":
        return np.where(item.canvas.given[span], mask_token_id, ids)
    return ids


def page_slots(pages: Sequence[int], page_size: int, length: int) -> NDArray[np.int64]:
    """Return the slots i64[length] of positions 0 to length in pages of page_size slots."""
    table = np.asarray(pages[: -(-length // page_size)], dtype=np.int64)
    return (table[:, None] * page_size + np.arange(page_size)).ravel()[:length]


def _visible_end(row: Row, block_length: int) -> Tensor | None:
    """Return for each query the end of its block, or None where that is the row's end for all of them."""
    if row.kind is not RowKind.PREFILL or row.end - row.start <= block_length:
        return None
    positions = np.arange(row.start, row.end)
    return torch.from_numpy((positions // block_length + 1) * block_length)


def _tensor(parts: list[NDArray[np.int64]], device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(device)
