"""The input of one forward: packed tokens, where their keys and values go, and what each query sees.

Letters: N packed tokens, H query heads, K key-value heads, D head width, S slots of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.models.paged import Paged, Shape
from sfumato.models.placing import placed

# A row has a call of its own for so many bytes of keys and values that are not copied: what a call costs over
# what a core copies meanwhile.
_ROW_BYTES = 128 << 10


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries of one row: packed positions [start, start + length) that see `key_slots`.

    key_slots: i64[T] slots of the page table in order, or None where the keys are those of this forward
    alone, at the same packed positions. A query sees keys [visible_start, visible_end) of them: i64[length]
    each, on the CPU; None: from the first, to the last.
    """

    start: int
    length: int
    key_slots: Tensor | None
    visible_end: Tensor | None
    visible_start: Tensor | None = None

    @property
    def num_keys(self) -> int:
        """Return T, how many keys the row's queries may see."""
        return self.length if self.key_slots is None else self.key_slots.shape[0]

    @property
    def is_masked(self) -> bool:
        """Whether some query does not see all keys."""
        return self.visible_start is not None or self.visible_end is not None


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
    """Keys and values of all layers: each Tensor[S, K, D] in the model's dtype, K and D by layer."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def allocate(
        cls,
        *,
        shapes: Sequence[tuple[int, int]],
        num_slots: int,
        dtype: torch.dtype,
        device: str,
    ) -> KVStore:
        """Allocate zeroed keys and values for num_slots tokens; shapes: (K, D) of each layer."""
        make = lambda: tuple(
            torch.zeros((num_slots, heads, width), dtype=dtype, device=device) for heads, width in shapes
        )
        return cls(keys=make(), values=make())

    @property
    def slot_bytes(self) -> int:
        """Return the bytes of one token's keys and values in the first layer."""
        _, heads, width = self.keys[0].shape
        return 2 * heads * width * self.keys[0].element_size()


@dataclass(frozen=True, slots=True)
class Batch:
    """token_ids, positions: i64[N]; write_slots: i64[M], write_tokens: i64[M] the packed tokens they keep.

    groups: who sees what; windowed: the same for sliding layers, of models that have them.
    output_tokens: i64[P] packed tokens whose hidden states are wanted; None: all. The last layer computes no
    others: keys and values are there before.
    is_context: bool[N], True where a token is encoded as causal context, for models that encode and denoise
    differently; None: nowhere. addend: [N, width] expected embeddings of canvas tokens under their step
    before, for models with self-conditioning; None: zeros.
    paged: what tokens see of the pool's pages, and where they are kept, in place of groups and write_slots;
    groups then hold only what is no such view. shape: of the recorded forward whose fixed place it fills.
    """

    token_ids: Tensor
    positions: Tensor
    groups: tuple[AttentionGroup, ...]
    store: KVStore | None = None
    write_slots: Tensor | None = None
    write_tokens: Tensor | None = None
    output_tokens: Tensor | None = None
    windowed: tuple[AttentionGroup, ...] = ()
    is_context: Tensor | None = None
    addend: Tensor | None = None
    paged: Paged | None = None
    shape: Shape | None = None


def group_segments(
    segments: list[Segment], device: torch.device | str, *, slot_bytes: int = 0
) -> tuple[AttentionGroup, ...]:
    """Join segments that have equal numbers of queries and keys, so that one call computes them.

    slot_bytes: of one token's keys and values; a row with many of them that lie together has a group of its
    own and sees them where they are. 0: rows are copied together.
    """
    by_shape: dict[tuple[int, int, bool, bool], list[Segment]] = {}
    groups: list[AttentionGroup] = []
    for segment in map(_without_unseen_keys, segments):
        apart = _apart(segment, device, slot_bytes)
        if apart is not None:
            groups.append(apart)
            continue
        from_pool = segment.key_slots is not None
        shape = (segment.length, segment.num_keys, from_pool, segment.is_masked)
        by_shape.setdefault(shape, []).append(segment)
    return (*groups, *(_group(members, device) for members in by_shape.values()))


def _apart(segment: Segment, device: torch.device | str, slot_bytes: int) -> AttentionGroup | None:
    """Return a group of one row that sees its slots where they lie; None where they are few or lie apart.

    Those that lie apart are copied together: answers of their pieces, joined by their masses, would have last
    bits that depend on where pages lie, and so on the neighbours.
    """
    if segment.key_slots is None or segment.num_keys * slot_bytes < _ROW_BYTES:
        return None
    keys = _slots([segment.key_slots], device)
    if not isinstance(keys, slice):
        return None
    return AttentionGroup(
        num_rows=1,
        queries=slice(segment.start, segment.start + segment.length),
        keys=keys,
        from_pool=True,
        mask=placed(_visible(segment)[None, None], device) if segment.is_masked else None,
    )


def _without_unseen_keys(segment: Segment) -> Segment:
    """Cut off the slots that no query sees, and the limits that then limit nothing."""
    if segment.key_slots is None or not segment.is_masked:
        return segment
    starts, ends = segment.visible_start, segment.visible_end
    first = 0 if starts is None else int(starts.min())
    last = segment.num_keys if ends is None else min(segment.num_keys, int(ends.max()))
    if starts is not None:
        starts = None if bool((starts <= first).all()) else starts - first
    if ends is not None:
        ends = None if bool((ends >= last).all()) else ends - first
    return replace(segment, key_slots=segment.key_slots[first:last], visible_start=starts, visible_end=ends)


def _group(members: list[Segment], device: torch.device | str) -> AttentionGroup:
    length = members[0].length
    from_pool = members[0].key_slots is not None
    starts = [segment.start for segment in members]
    adjacent = starts == list(range(starts[0], starts[0] + length * len(members), length))
    queries: slice | Tensor
    if adjacent:
        queries = slice(starts[0], starts[0] + length * len(members))
    else:
        queries = placed((torch.tensor(starts)[:, None] + torch.arange(length)).flatten(), device)
    keys: slice | Tensor = queries
    if from_pool:
        keys = _slots([segment.key_slots for segment in members if segment.key_slots is not None], device)
    mask = None
    if members[0].is_masked:
        mask = placed(torch.stack([_visible(segment) for segment in members]).unsqueeze(1), device)
    return AttentionGroup(num_rows=len(members), queries=queries, keys=keys, from_pool=from_pool, mask=mask)


def _visible(segment: Segment) -> Tensor:
    """Return bool[length, T], True where a query sees a key."""
    keys = torch.arange(segment.num_keys)
    visible = torch.ones(segment.length, segment.num_keys, dtype=torch.bool)
    if segment.visible_start is not None:
        visible &= keys >= segment.visible_start[:, None]
    if segment.visible_end is not None:
        visible &= keys < segment.visible_end[:, None]
    return visible


def _slots(tables: list[Tensor], device: torch.device | str) -> slice | Tensor:
    """Return a slice for a single table of consecutive slots, which needs no copy of its keys."""
    if len(tables) == 1:
        table = tables[0]
        first, last = int(table[0]), int(table[-1])
        if last - first + 1 == table.shape[0] and bool((table[1:] > table[:-1]).all()):
            return slice(first, last + 1)
        return placed(table, device)
    return placed(torch.cat(tables), device)
