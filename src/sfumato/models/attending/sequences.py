"""Rows of a batch over pages as sequences, the one form that foreign libraries of attention have in common.

A sequence is a run of queries, packed beside each other, that all see the same keys: the first `num_keys` of
its page table, and no more is said of them. Everything is laid out on the host. Letters: N packed tokens, S
sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sfumato.models.paged import Compute, Foreign, Paged, PagedRow, tiles_of
from sfumato.models.placing import placed

# Of a row whose queries see different keys: with fewer queries that share theirs, on average, its keys would
# be read again and again for too few products.
_SHORTEST_RUN = 16


@dataclass(frozen=True, slots=True)
class Sequences:
    """lengths, num_keys: i32[S] queries and keys of each; pages: i32[ceil(num_keys / page_size)] of each."""

    lengths: NDArray[np.int32]
    num_keys: NDArray[np.int32]
    pages: list[NDArray[np.int32]]
    page_size: int

    @property
    def starts(self) -> NDArray[np.int32]:
        """Return i32[S + 1], where the queries of each begin, and the end of all."""
        return starts_of(self.lengths)

    def table(self) -> NDArray[np.int32]:
        """Return the pages as i32[S, most], zeros behind those of each."""
        table = np.zeros((len(self.pages), max(map(len, self.pages))), dtype=np.int32)
        for row, pages in zip(table, self.pages, strict=True):
            row[: len(pages)] = pages
        return table


class Adapter(Protocol):
    """A foreign library's attention over one engine's pages."""

    def plan(self, sequences: Sequences) -> Compute:
        """Return what computes these sequences, in one layer after another of one forward."""
        ...


def starts_of(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return i32[S + 1], the sums of all lengths in front of each, and of all."""
    return np.concatenate([np.zeros(1, dtype=np.int32), np.cumsum(lengths, dtype=np.int32)])


def give_away(
    rows: Sequence[PagedRow], paged: Paged, adapter: Adapter, *, has_window: bool, device: torch.device
) -> Paged:
    """Return what tokens see, where an adapter computes all rows that sequences can express.

    has_window: the model has sliding layers. Others keep their tiles: those of causal contexts, and in
    sliding layers those whose first key does not begin a page.
    """
    give = lambda windowed: _give(rows, paged, adapter, windowed=windowed, device=device)
    return replace(paged, full=give(False), sliding=give(True) if has_window else None)


def _give(
    rows: Sequence[PagedRow], paged: Paged, adapter: Adapter, *, windowed: bool, device: torch.device
) -> Foreign | None:
    found: list[_Run] = []
    tokens: list[NDArray[np.int64]] = []
    left = [np.zeros((0, 3), dtype=np.int64)]
    begin = 0
    for row in rows:
        runs = _runs_of(row, paged.page_size, windowed=windowed)
        if runs is not None:
            found += runs
            tokens.append(np.arange(row.start, row.start + row.length))
        elif len(row.pages):
            left.append(tiles_of([row], paged.tile) + np.asarray([0, 0, begin]))
        begin += len(row.pages)
    if not found:
        return None
    sequences = Sequences(
        lengths=np.asarray([run.length for run in found], dtype=np.int32),
        num_keys=np.asarray([run.num_keys for run in found], dtype=np.int32),
        pages=[run.pages for run in found],
        page_size=paged.page_size,
    )
    is_all = len(tokens) == len(rows)
    return Foreign(
        compute=adapter.plan(sequences),
        tokens=None if is_all else placed(np.concatenate(tokens), device),
        tiles=placed(np.concatenate(left), device),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    length: int
    num_keys: int
    pages: NDArray[np.int32]


def _runs_of(row: PagedRow, page_size: int, *, windowed: bool) -> list[_Run] | None:
    """Return a row's runs of queries that see the same keys; None where they are no sequences or too many."""
    if not len(row.pages):
        return None
    first = row.first if windowed else np.zeros_like(row.end)
    borders = np.flatnonzero((np.diff(first) != 0) | (np.diff(row.end) != 0)) + 1
    starts = [0, *borders.tolist()]
    stops = [*starts[1:], row.length]
    if len(starts) > 1 and row.length < _SHORTEST_RUN * len(starts):
        return None
    if bool((first % page_size != 0).any()) or bool((first >= row.end).any()):
        return None
    runs = []
    for start, stop in zip(starts, stops, strict=True):
        begin, end = int(first[start]), int(row.end[start])
        pages = row.pages[begin // page_size : -(-end // page_size)]
        runs.append(_Run(stop - start, end - begin, pages.astype(np.int32)))
    return runs
