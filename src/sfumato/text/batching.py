"""The one place where rows become the tensors of a forward.

Letters: N packed tokens, L canvas positions, B block length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.core.plan import Row, RowKind
from sfumato.core.traits import ModelTraits
from sfumato.models.batch import Batch, KVStore, Segment, group_segments
from sfumato.models.placing import placed


@dataclass(frozen=True, slots=True)
class FedRow:
    """A row with the tokens i64[end - start] that it feeds and the pages that hold its keys and values.

    addend: [end - start, width] expected embeddings of its tokens, for models with self-conditioning.
    """

    row: Row
    token_ids: NDArray[np.int64]
    pages: Sequence[int] | None
    block_length: int
    addend: Tensor | None = None

    @property
    def length(self) -> int:
        """Return how many tokens are fed."""
        return self.row.end - self.row.start


def make_batch(
    fed: Sequence[FedRow],
    *,
    traits: ModelTraits,
    output_tokens: NDArray[np.int64],
    store: KVStore | None,
    page_size: int,
    device: torch.device | str,
) -> Batch:
    """Pack rows into one batch whose forward returns the hidden states of output_tokens, i64[P] packed.

    Rows with a slot write their keys and values to their pages and see slots from the first on; rows without
    see exactly themselves.
    """
    segments, windowed = [], []
    write_slots: list[NDArray[np.int64]] = []
    write_tokens: list[NDArray[np.int64]] = []
    total = 0
    for item in fed:
        row, length = item.row, item.length
        segment, own = segment_of(item, total, traits, page_size)
        if own is not None:
            write_slots.append(own[row.border :])
            write_tokens.append(np.arange(total + row.border, total + length))
        segments.append(segment)
        if traits.window is not None:
            windowed.append(replace(segment, visible_start=torch.from_numpy(visible_start(item, traits))))
        total += length
    # On a GPU rows of one batch are one call, not one after another.
    slot_bytes = store.slot_bytes if store is not None and not store.keys[0].is_cuda else 0
    return Batch(
        token_ids=_tensor([item.token_ids for item in fed], device),
        positions=_tensor([np.arange(item.row.start, item.row.end) for item in fed], device),
        groups=group_segments(segments, device, slot_bytes=slot_bytes),
        windowed=group_segments(windowed, device) if windowed else (),
        store=store if write_slots else None,
        write_slots=_tensor(write_slots, device) if write_slots else None,
        write_tokens=_tensor(write_tokens, device) if write_tokens else None,
        output_tokens=_tensor([output_tokens], device),
        is_context=context_flags(fed, device) if traits.context_granularity == 1 else None,
        addend=addends(fed) if traits.has_self_conditioning else None,
    )


def segment_of(
    item: FedRow, start: int, traits: ModelTraits, page_size: int
) -> tuple[Segment, NDArray[np.int64] | None]:
    """Return what a row's queries see, packed from `start` on, and the slots i64[length] of their own keys.

    Slots are None for rows that see exactly themselves.
    """
    row, length = item.row, item.length
    if item.pages is None or row.slot is None:
        return Segment(start=start, length=length, key_slots=None, visible_end=None), None
    last = row.slot + length
    slots = page_slots(item.pages, page_size, max(last, row.visible or last))
    own = slots[row.slot : last]
    seen = slots[: row.visible]
    if row.visible is not None and row.slot >= row.visible:
        seen = np.concatenate([seen, own])
    return Segment(start, length, torch.from_numpy(seen), _ends(visible_end(item, traits))), own


def context_flags(fed: Sequence[FedRow], device: torch.device | str) -> Tensor | None:
    """Return bool[N], True for tokens that are encoded; None where none is."""
    kinds = [item.row.kind is not RowKind.DENOISE for item in fed]
    if not any(kinds):
        return None
    return _tensor([np.full(item.length, kind) for item, kind in zip(fed, kinds, strict=True)], device)


def addends(fed: Sequence[FedRow]) -> Tensor | None:
    """Return [N, width], zeros where a row has none; None where no row has one."""
    sample = next((item.addend for item in fed if item.addend is not None), None)
    if sample is None:
        return None
    return torch.cat(
        [
            sample.new_zeros(item.length, sample.shape[-1]) if item.addend is None else item.addend
            for item in fed
        ]
    )


def page_slots(pages: Sequence[int], page_size: int, length: int) -> NDArray[np.int64]:
    """Return the slots i64[length] of positions 0 to length in pages of page_size slots."""
    table = np.asarray(pages[: -(-length // page_size)], dtype=np.int64)
    return (table[:, None] * page_size + np.arange(page_size)).ravel()[:length]


def visible_end(item: FedRow, traits: ModelTraits) -> NDArray[np.int64] | None:
    """Return for each query where its keys end: its block, or itself in a causal context; None: the row."""
    row, block = item.row, item.block_length
    if row.visible is not None:
        return None
    if traits.context_granularity == 1:
        is_context = row.kind is not RowKind.DENOISE
        return np.arange(row.start + 1, row.end + 1) if is_context else None
    if row.start // block == (row.end - 1) // block:
        return None
    positions = np.arange(row.start, row.end)
    ends: NDArray[np.int64] = np.minimum((positions // block + 1) * block, row.end)
    return ends


def visible_start(item: FedRow, traits: ModelTraits) -> NDArray[np.int64]:
    """Return for each query of a sliding layer its first key; zeros without such layers.

    A context token sees a window that ends with itself; all canvas tokens see what the canvas's first one
    would.
    """
    row, window = item.row, traits.window
    if window is None:
        return np.zeros(item.length, dtype=np.int64)
    if row.kind is RowKind.DENOISE:
        return np.full(item.length, max(0, (row.slot or 0) - window + 1), dtype=np.int64)
    return np.maximum(np.arange(row.start + 1, row.end + 1) - window, 0)


def _ends(ends: NDArray[np.int64] | None) -> Tensor | None:
    return None if ends is None else torch.from_numpy(ends)


def _tensor(parts: list[NDArray[np.int64]], device: torch.device | str) -> Tensor:
    return placed(np.concatenate(parts), device)
