"""What packed queries see of the pool's pages, as one array of numbers that kernels read.

The array is made on the host and goes to the device in one copy, to memory of its own or to the fixed place
from which a recorded forward reads. Letters: N packed tokens, T tiles, P pages of all rows, H query heads, K
key-value heads, D head width, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.models.kernels import run_on

# Queries of one tile: as many as a row has, within these.
_SMALLEST_TILE, _LARGEST_TILE = 4, 64
# Numbers per token: id, position, slot, first and end of what is seen.
_PER_TOKEN = 5
# A tile's first packed token, its queries, and where its row's pages begin.
_PER_TILE = 3


# From queries [M, H, D], keys and values [pages, page_size, K, D] and a scale to what queries see, [M, H, D].
Compute = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, slots=True)
class Foreign:
    """Queries that an installed library computes: i64[M] packed tokens, None: all.

    tiles: i64[T, 3], those of the queries that it does not.
    """

    compute: Compute
    tokens: Tensor | None
    tiles: Tensor


@dataclass(frozen=True, slots=True)
class Paged:
    """write_slots: i64[N] where keys and values of each token go, -1: nowhere.

    A query sees keys [first, end) of its row's pages, i64[N] each; `first` counts in sliding layers alone.
    tiles: i64[T, 3], queries of one row that a program computes: the first packed token, how many, where the
    row's pages begin in `pages`, i64[P]. Key j of a row lies in slot pages[j // page_size] * page_size + j %
    page_size. tile: the most queries of one. Tokens in no tile are left alone. full, sliding: what a library
    computes in place of these tiles, in layers of either kind.
    """

    write_slots: Tensor
    first: Tensor
    end: Tensor
    tiles: Tensor
    pages: Tensor
    tile: int
    page_size: int
    full: Foreign | None = None
    sliding: Foreign | None = None


@dataclass(frozen=True, slots=True)
class PagedRow:
    """Queries of one row, packed from `start` on: token ids, positions, slots, first, end: i64[length] each.

    pages: of the row; none where it sees nothing of the pool: then no tile computes it.
    """

    start: int
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    first: NDArray[np.int64]
    end: NDArray[np.int64]
    pages: NDArray[np.int64]

    @property
    def length(self) -> int:
        """Return how many queries it has."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Shape:
    """N tokens in T tiles of at most `tile` queries."""

    num_tokens: int
    num_tiles: int
    tile: int

    def numbers(self, rows: Sequence[PagedRow], output_tokens: NDArray[np.int64]) -> Numbers:
        """Lay the numbers of rows that fit out, filled up to this shape."""
        return numbers_of(
            rows, output_tokens, num_tokens=self.num_tokens, num_tiles=self.num_tiles, tile=self.tile
        )

    @property
    def num_numbers(self) -> int:
        """Return how many numbers lie in front of those that vary."""
        return _PER_TOKEN * self.num_tokens + _PER_TILE * self.num_tiles


@dataclass(frozen=True, slots=True)
class Numbers:
    """Everything that a forward over pages is told: `values`, i64, in the order of `views`.

    num_tokens, num_tiles: with those that fill up to a recorded forward's shape. What varies between its
    replays, pages and tokens whose hidden states are wanted, lies behind all that does not.
    """

    values: NDArray[np.int64]
    num_tokens: int
    num_tiles: int
    num_pages: int
    tile: int

    @property
    def size(self) -> int:
        """Return how many numbers there are."""
        return len(self.values)


@dataclass(frozen=True, slots=True)
class Views:
    """The parts of an array of numbers on the device. output_tokens: i64 of those that are wanted."""

    token_ids: Tensor
    positions: Tensor
    output_tokens: Tensor
    paged: Paged


def tile_of(rows: Sequence[PagedRow]) -> int:
    """Return how many queries a tile of these rows has: a power of two."""
    longest = max((row.length for row in rows), default=1)
    return min(_LARGEST_TILE, max(_SMALLEST_TILE, 1 << (longest - 1).bit_length()))


def tiles_of(rows: Sequence[PagedRow], tile: int, num_filled: int = 0) -> NDArray[np.int64]:
    """Return i64[T, 3]; num_filled: tokens behind all rows that see nothing."""
    found: list[tuple[int, int, int]] = []
    begin = total = 0
    for row in rows:
        total = row.start + row.length
        if len(row.pages):
            found += [
                (row.start + at, min(tile, row.length - at), begin) for at in range(0, row.length, tile)
            ]
            begin += len(row.pages)
    found += [(total + at, min(tile, num_filled - at), 0) for at in range(0, num_filled, tile)]
    return np.asarray(found, dtype=np.int64).reshape(-1, _PER_TILE)


def numbers_of(
    rows: Sequence[PagedRow],
    output_tokens: NDArray[np.int64],
    *,
    num_tokens: int | None = None,
    num_tiles: int | None = None,
    tile: int | None = None,
) -> Numbers:
    """Lay the numbers of all rows out, filled up to num_tokens and num_tiles of at most `tile` queries.

    A token that fills up has position 0 and id 0, sees nothing and is kept nowhere.
    """
    own = sum(row.length for row in rows)
    count = own if num_tokens is None else num_tokens
    tile = tile_of(rows) if tile is None else tile
    tiles = tiles_of(rows, tile, count - own)
    per_token = np.zeros((_PER_TOKEN, count), dtype=np.int64)
    per_token[2, own:] = -1
    for row in rows:
        span = slice(row.start, row.start + row.length)
        per_token[:, span] = row.token_ids, row.positions, row.slots, row.first, row.end
    filled = np.zeros((len(tiles) if num_tiles is None else num_tiles, _PER_TILE), dtype=np.int64)
    filled[: len(tiles)] = tiles
    pages = [np.asarray(row.pages, dtype=np.int64) for row in rows if len(row.pages)]
    values = np.concatenate([per_token.ravel(), filled.ravel(), *pages, output_tokens])
    return Numbers(values, count, len(filled), sum(map(len, pages)), tile)


def views_of(numbers: Numbers, values: Tensor, page_size: int) -> Views:
    """Return the parts of numbers that lie in i64[size] on the device; `pages` goes on to the array's end."""
    count, num_tiles = numbers.num_tokens, numbers.num_tiles
    token_ids, positions, slots, first, end = values[: _PER_TOKEN * count].view(_PER_TOKEN, count)
    rest = values[_PER_TOKEN * count :]
    tiles, rest = rest[: _PER_TILE * num_tiles].view(num_tiles, _PER_TILE), rest[_PER_TILE * num_tiles :]
    paged = Paged(slots, first, end, tiles, rest, numbers.tile, page_size)
    return Views(token_ids, positions, rest[numbers.num_pages : numbers.size - len(values) or None], paged)


def keep(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, write_slots: Tensor) -> None:
    """Write key, value: [N, K, D] to the slots of keys, values: [S, K, D]; slot -1 is none. In place."""
    if run_on(keys):
        from sfumato.models.kernels.keeping import keep_rows

        keep_rows(key, value, keys, values, write_slots)
        return
    at = torch.nonzero(write_slots >= 0).flatten()
    keys.index_copy_(0, write_slots[at], key[at])
    values.index_copy_(0, write_slots[at], value[at])


def attend_pages(
    query: Tensor, keys: Tensor, values: Tensor, paged: Paged, output: Tensor, *, windowed: bool, scale: float
) -> None:
    """Let the queries of all tiles, [N, H, D], see their keys and values: [S, K, D]. Writes into output."""
    foreign = paged.sliding if windowed else paged.full
    if foreign is not None:
        _attend_foreign(query, keys, values, paged.page_size, foreign, output, scale)
        paged = replace(paged, tiles=foreign.tiles)
    if run_on(keys):
        from sfumato.models.kernels.attention import attend_tiles

        attend_tiles(query, keys, values, paged, output, windowed=windowed, scale=scale)
        return
    for start, count, begin in paged.tiles.tolist():
        if count:
            span = slice(start, start + count)
            output[span] = _attend_tile(
                query[span],
                keys,
                values,
                paged.pages[begin:],
                paged.page_size,
                paged.first[span] if windowed else torch.zeros_like(paged.first[span]),
                paged.end[span],
                scale,
            )


def _attend_foreign(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    page_size: int,
    foreign: Foreign,
    output: Tensor,
    scale: float,
) -> None:
    by_page = (-1, page_size, *keys.shape[1:])
    own = query if foreign.tokens is None else query[foreign.tokens]
    seen = foreign.compute(own, keys.view(by_page), values.view(by_page), scale)
    if foreign.tokens is None:
        output.copy_(seen)
    else:
        output[foreign.tokens] = seen


def _attend_tile(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    page_size: int,
    first: Tensor,
    end: Tensor,
    scale: float,
) -> Tensor:
    """Return [Q, H, D] of queries that share a row's pages; zeros where a query sees nothing."""
    at = torch.arange(int(end.max()), device=query.device)
    slots = pages[at // page_size] * page_size + at % page_size
    shared = query.shape[1] // keys.shape[1]
    key = keys[slots].repeat_interleave(shared, 1).float()
    value = values[slots].repeat_interleave(shared, 1).float()
    is_seen = (at >= first[:, None]) & (at < end[:, None])
    scores = torch.einsum("qhd,thd->hqt", query.float(), key) * scale
    scores = scores.masked_fill(~is_seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqt,thd->qhd", weights, value).to(query.dtype)
