"""Rows as a batch over pages: what a GPU's kernels read, and what a recorded forward is replayed on.

Rows that are no view of their pages, because they have none or see them in two pieces, stay groups of the
same batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from sfumato.core.traits import ModelTraits
from sfumato.models.attending import Attention
from sfumato.models.attending.sequences import give_away
from sfumato.models.batch import Batch, KVStore, Segment, group_segments
from sfumato.models.graphs import Replays
from sfumato.models.kernels import run_on
from sfumato.models.paged import PagedRow, numbers_of, views_of
from sfumato.models.placing import placed
from sfumato.text.batching import (
    FedRow,
    addends,
    context_flags,
    make_batch,
    segment_of,
    visible_end,
    visible_start,
)


def batch_of(
    fed: Sequence[FedRow],
    *,
    traits: ModelTraits,
    output_tokens: NDArray[np.int64],
    store: KVStore | None,
    page_size: int,
    device: torch.device,
    graphs: Replays | None = None,
    attention: Attention = Attention(),
) -> Batch:
    """Pack rows in the form that the device's attention takes: over pages where kernels or recordings run."""
    has_pages = any(item.pages is not None and item.row.slot is not None for item in fed)
    has_kernels = store is not None and attention.has_kernels and run_on(store.keys[0])
    if store is None or not has_pages or not (graphs is not None or has_kernels):
        return make_batch(
            fed,
            traits=traits,
            output_tokens=output_tokens,
            store=store,
            page_size=page_size,
            device=device,
        )
    rows, others, windowed = _rows_of(fed, traits, page_size)
    flags = context_flags(fed, device) if traits.context_granularity == 1 else None
    addend = addends(fed) if traits.has_self_conditioning else None
    if graphs is not None and not others and flags is None and addend is None:
        shape = graphs.shape_of(rows)
        if shape is not None:
            return graphs.batch(shape, shape.numbers(rows, output_tokens))
    numbers = numbers_of(rows, output_tokens)
    views = views_of(numbers, placed(numbers.values, device), page_size)
    paged, has_window = views.paged, traits.window is not None
    if attention.adapter is not None:
        paged = give_away(rows, paged, attention.adapter, has_window=has_window, device=device)
    return Batch(
        token_ids=views.token_ids,
        positions=views.positions,
        groups=group_segments(others, device) if others else (),
        windowed=group_segments(windowed, device) if windowed else (),
        store=store,
        output_tokens=views.output_tokens,
        is_context=flags,
        addend=addend,
        paged=paged,
    )


def _rows_of(
    fed: Sequence[FedRow], traits: ModelTraits, page_size: int
) -> tuple[list[PagedRow], list[Segment], list[Segment]]:
    """Return all rows, and segments of those that are no view of their pages: of full and sliding layers."""
    rows: list[PagedRow] = []
    others: list[Segment] = []
    windowed: list[Segment] = []
    total = 0
    for item in fed:
        row, length = item.row, item.length
        segment, own = segment_of(item, total, traits, page_size)
        zeros = np.zeros(length, dtype=np.int64)
        first, end, slots, pages = zeros, zeros, zeros - 1, np.empty(0, dtype=np.int64)
        if own is not None:
            slots = own.copy()
            slots[: row.border] = -1
        if own is None or _sees_two_pieces(item):
            others.append(segment)
            if traits.window is not None:
                start = torch.from_numpy(visible_start(item, traits))
                windowed.append(replace(segment, visible_start=start))
        else:
            last = (row.slot or 0) + length
            ends = visible_end(item, traits)
            seen = last if row.visible is None else row.visible
            end = np.full(length, seen, dtype=np.int64) if ends is None else ends
            first = visible_start(item, traits)
            pages = np.asarray(item.pages, dtype=np.int64)[: -(-max(last, seen) // page_size)]
        rows.append(PagedRow(total, item.token_ids, np.arange(row.start, row.end), slots, first, end, pages))
        total += length
    return rows, others, windowed


def _sees_two_pieces(item: FedRow) -> bool:
    """Whether a row's own keys lie behind all that it sees otherwise."""
    row = item.row
    return row.visible is not None and row.slot is not None and row.slot >= row.visible
