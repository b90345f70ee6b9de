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
        if item.pages is None or row.slot is None:
            segment = Segment(start=total, length=length, key_slots=None, visible_end=None)
        else:
            last = row.slot + length
            slots = page_slots(item.pages, page_size, max(last, row.visible or last))
            own = slots[row.slot : last]
            write_slots.append(own[row.border :])
            write_tokens.append(np.arange(total + row.border, total + length))
            seen = slots[: row.visible]
            if row.visible is not None and row.slot >= row.visible:
                seen = np.concatenate([seen, own])
            keys = torch.from_numpy(seen)
            segment = Segment(total, length, keys, _visible_end(item, traits))
        segments.append(segment)
        if traits.window is not None:
            windowed.append(replace(segment, visible_start=_visible_start(item, traits)))
        total += length
    return Batch(
        token_ids=_tensor([item.token_ids for item in fed], device),
        positions=_tensor([np.arange(item.row.start, item.row.end) for item in fed], device),
        groups=group_segments(segments, device),
        windowed=group_segments(windowed, device) if windowed else (),
        store=store if write_slots else None,
        write_slots=_tensor(write_slots, device) if write_slots else None,
        write_tokens=_tensor(write_tokens, device) if write_tokens else None,
        output_tokens=_tensor([output_tokens], device),
        is_context=_is_context(fed, device) if traits.context_granularity == 1 else None,
        addend=_addend(fed) if traits.has_self_conditioning else None,
    )


def _is_context(fed: Sequence[FedRow], device: torch.device | str) -> Tensor | None:
    """Return bool[N], True for tokens that are encoded; None where none is."""
    kinds = [item.row.kind is not RowKind.DENOISE for item in fed]
    if not any(kinds):
        return None
    return _tensor([np.full(item.length, kind) for item, kind in zip(fed, kinds, strict=True)], device)


def _addend(fed: Sequence[FedRow]) -> Tensor | None:
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


def _visible_end(item: FedRow, traits: ModelTraits) -> Tensor | None:
    """Return for each query where its keys end: its block, or itself in a causal context; None: the row."""
    row, block = item.row, item.block_length
    if row.visible is not None:
        return None
    if traits.context_granularity == 1:
        is_context = row.kind is not RowKind.DENOISE
        return torch.arange(row.start + 1, row.end + 1) if is_context else None
    if row.start // block == (row.end - 1) // block:
        return None
    positions = np.arange(row.start, row.end)
    return torch.from_numpy(np.minimum((positions // block + 1) * block, row.end))


def _visible_start(item: FedRow, traits: ModelTraits) -> Tensor:
    """Return for each query of a sliding layer its first key.

    A context token sees a window that ends with itself; all canvas tokens see what the canvas's first one
    would.
    """
    row, window = item.row, traits.window or 0
    if row.kind is RowKind.DENOISE:
        return torch.full((item.length,), max(0, (row.slot or 0) - window + 1))
    return torch.arange(row.start + 1, row.end + 1).sub(window).clamp(min=0)


def _tensor(parts: list[NDArray[np.int64]], device: torch.device | str) -> Tensor:
    return placed(np.concatenate(parts), device)
