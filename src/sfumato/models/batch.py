"""The input of one forward: packed tokens, where their keys and values go, and what each query sees.

Letters: N packed tokens, H query heads, K key-value heads, D head width, S slots of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries of one row: packed positions [start, start + length) that see `key_slots`.

    key_slots: i64[T] slots of the page table in order, or None where the keys are those of this forward
    alone, at the same packed positions. visible_end: i64[length] counts into those keys, or None where
    every query sees all of them.
    """

    start: int
    length: int
    key_slots: Tensor | None
    visible_end: Tensor | None

    @property
    def num_keys(self) -> int:
        """Return T, how many keys the row's queries may see."""
        return self.length if self.key_slots is None else self.key_slots.shape[0]


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Segments of equal shape that one kernel call serves.

    queries: i64[R * Q] packed positions, or a slice where they lie together. keys: i64[R * T] slots or packed
    positions, or a slice. mask: bool[R, 1, Q, T], True where a query sees a key; None: everything.
    """

    num_rows: int
    queries: slice | Tensor
    keys: slice | Tensor
    from_pool: bool
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class KVStore:
    """Keys and values of all layers: each Tensor[S, K, D] in the model's dtype."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        num_slots: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str,
    ) -> KVStore:
        """Allocate zeroed keys and values for num_slots tokens."""
        shape = (num_slots, num_heads, head_dim)
        make = lambda: tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers))
        return cls(keys=make(), values=make())


@dataclass(frozen=True, slots=True)
class Batch:
    """token_ids, positions: i64[N]; write_slots: i64[M], write_tokens: i64[M] the packed tokens they keep.

    output_tokens: i64[P] packed tokens whose hidden states are wanted; None: all. The last layer computes no
    others: keys and values are there before.
    """

    token_ids: Tensor
    positions: Tensor
    groups: tuple[AttentionGroup, ...]
    store: KVStore | None = None
    write_slots: Tensor | None = None
    write_tokens: Tensor | None = None
    output_tokens: Tensor | None = None


def group_segments(segments: list[Segment], device: torch.device | str) -> tuple[AttentionGroup, ...]:
    """Join segments that have equal numbers of queries and keys, so that one call computes them."""
    by_shape: dict[tuple[int, int, bool, bool], list[Segment]] = {}
    for segment in segments:
        from_pool = segment.key_slots is not None
        shape = (segment.length, segment.num_keys, from_pool, segment.visible_end is not None)
        by_shape.setdefault(shape, []).append(segment)
    return tuple(_group(members, device) for members in by_shape.values())


def _group(members: list[Segment], device: torch.device | str) -> AttentionGroup:
    length, num_keys = members[0].length, members[0].num_keys
    from_pool = members[0].key_slots is not None
    starts = [segment.start for segment in members]
    adjacent = starts == list(range(starts[0], starts[0] + length * len(members), length))
    queries: slice | Tensor
    if adjacent:
        queries = slice(starts[0], starts[0] + length * len(members))
    else:
        queries = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten().to(device)
    keys: slice | Tensor = queries
    if from_pool:
        keys = _slots([segment.key_slots for segment in members if segment.key_slots is not None], device)
    mask = None
    if members[0].visible_end is not None:
        ends = torch.stack([segment.visible_end for segment in members if segment.visible_end is not None])
        mask = (torch.arange(num_keys) < ends[:, :, None]).unsqueeze(1).to(device)
    return AttentionGroup(num_rows=len(members), queries=queries, keys=keys, from_pool=from_pool, mask=mask)


def _slots(tables: list[Tensor], device: torch.device | str) -> slice | Tensor:
    """Return a slice for a single table of consecutive slots, which needs no copy of its keys."""
    if len(tables) == 1:
        table = tables[0]
        first, last = int(table[0]), int(table[-1])
        if last - first + 1 == table.shape[0] and bool((table[1:] > table[:-1]).all()):
            return slice(first, last + 1)
        return table.to(device)
    return torch.cat(tables).to(device)
