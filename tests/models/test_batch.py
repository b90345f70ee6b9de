"""Groups of segments: whatever is cut off or joined, a query attends to exactly the keys that it may see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sfumato.models.attention import attend, sdpa
from sfumato.models.batch import AttentionGroup, Batch, KVStore, Segment, group_segments

HEADS, KV_HEADS, WIDTH, SLOTS = 4, 2, 8, 40


def draw(*shape: int) -> Tensor:
    """Return seeded noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def naive(query: Tensor, store: KVStore, segments: list[Segment], scale: float) -> Tensor:
    """Attend query by query and head by head."""
    output = torch.empty_like(query)
    for segment in segments:
        assert segment.key_slots is not None
        for index in range(segment.length):
            first = 0 if segment.visible_start is None else int(segment.visible_start[index])
            last = None if segment.visible_end is None else int(segment.visible_end[index])
            slots = segment.key_slots[first:last]
            for head in range(HEADS):
                kv_head = head // (HEADS // KV_HEADS)
                scores = store.keys[0][slots, kv_head] @ query[segment.start + index, head] * scale
                output[segment.start + index, head] = scores.softmax(-1) @ store.values[0][slots, kv_head]
    return output


SEGMENTS = {
    "everything": [Segment(0, 3, torch.arange(9), None)],
    "scattered slots": [Segment(0, 3, torch.tensor([7, 3, 20, 4, 5]), None)],
    "causal": [Segment(0, 4, torch.arange(4), torch.arange(1, 5))],
    "causal in a window": [
        Segment(0, 6, torch.arange(10), torch.arange(5, 11), torch.tensor([2, 3, 4, 5, 6, 7]))
    ],
    "a window that all queries share": [Segment(0, 3, torch.arange(20), None, torch.full((3,), 8))],
    "keys that nobody sees": [Segment(0, 2, torch.arange(20), torch.tensor([9, 9]), torch.tensor([4, 4]))],
    "ends beyond the last key": [Segment(0, 3, torch.arange(5), torch.tensor([4, 8, 8]))],
    "rows of equal shape": [
        Segment(0, 2, torch.arange(6), None, torch.tensor([1, 1])),
        Segment(2, 2, torch.arange(20, 26), None, torch.tensor([1, 1])),
    ],
    "masked and unmasked rows of equal shape": [
        Segment(0, 2, torch.arange(6), None),
        Segment(2, 2, torch.arange(20, 26), torch.tensor([3, 6])),
        Segment(4, 2, torch.arange(30, 36), torch.tensor([6, 6]), torch.tensor([0, 2])),
    ],
}


# So many bytes of keys make every row worth a call of its own, or none.
@pytest.mark.parametrize("slot_bytes", [0, 1 << 30])
@pytest.mark.parametrize("name", SEGMENTS)
def test_a_query_sees_exactly_its_keys(name: str, slot_bytes: int) -> None:
    segments = SEGMENTS[name]
    num_tokens = sum(segment.length for segment in segments)
    store = KVStore((draw(SLOTS, KV_HEADS, WIDTH),), (draw(SLOTS, KV_HEADS, WIDTH) + 1,))
    query, unused = draw(num_tokens, HEADS, WIDTH), torch.empty(num_tokens, KV_HEADS, WIDTH)
    batch = Batch(
        token_ids=torch.zeros(num_tokens, dtype=torch.long),
        positions=torch.arange(num_tokens),
        groups=(),
        windowed=group_segments(segments, "cpu", slot_bytes=slot_bytes),
        store=store,
    )
    found = attend(query, unused, unused, batch, 0, windowed=True, scale=0.7)
    torch.testing.assert_close(found, naive(query, store, segments, 0.7), atol=1e-5, rtol=1e-5)


def only(groups: tuple[AttentionGroup, ...]) -> AttentionGroup:
    """Return the one group."""
    assert len(groups) == 1
    return groups[0]


def test_unseen_slots_are_not_read_and_a_shared_window_needs_no_mask() -> None:
    group = only(group_segments([Segment(0, 3, torch.arange(20), None, torch.full((3,), 8))], "cpu"))
    assert group.keys == slice(8, 20)
    assert group.mask is None


def test_rows_of_equal_windows_share_a_call() -> None:
    segments = [
        Segment(0, 2, torch.arange(9), None, torch.full((2,), 5)),
        Segment(2, 2, torch.arange(20, 30), None, torch.full((2,), 6)),
    ]
    assert only(group_segments(segments, "cpu")).num_rows == 2


def test_many_keys_that_lie_together_are_seen_where_they_lie() -> None:
    together = Segment(0, 2, torch.arange(10, 26), None)
    masked = Segment(2, 2, torch.arange(10, 26), torch.tensor([12, 16]))
    apart = Segment(4, 2, torch.cat([torch.arange(4, 14), torch.arange(20, 26)]), None)
    slot_bytes = (128 << 10) // 16
    groups = group_segments([together, masked, apart], "cpu", slot_bytes=slot_bytes)
    assert [group.keys for group in groups[:2]] == [slice(10, 26)] * 2
    assert isinstance(groups[2].keys, Tensor)
    rows = [together, replace(together, start=2)]
    assert only(group_segments(rows, "cpu", slot_bytes=slot_bytes - 1)).num_rows == 2


def test_where_keys_lie_and_who_shares_a_call_changes_no_bit() -> None:
    keys, values = draw(400, KV_HEADS, WIDTH), draw(400, KV_HEADS, WIDTH) + 1
    query, starts, length = draw(3 * 5, HEADS, WIDTH), (0, 104, 291), 77
    at = torch.cat([torch.arange(start, start + length) for start in starts])
    mask = torch.rand((3, 1, 5, length), generator=torch.Generator().manual_seed(0)) > 0.3
    for seen in (None, mask):
        together = sdpa(query, keys[at], values[at], num_rows=3, mask=seen)
        for row, start in enumerate(starts):
            own = slice(start, start + length)
            part = None if seen is None else seen[row : row + 1]
            alone = sdpa(query[row * 5 : row * 5 + 5], keys[own], values[own], num_rows=1, mask=part)
            assert torch.equal(alone, together[row * 5 : row * 5 + 5])


def test_sliding_layers_need_groups_of_their_own() -> None:
    batch = Batch(
        token_ids=torch.zeros(1, dtype=torch.long),
        positions=torch.zeros(1, dtype=torch.long),
        groups=group_segments([Segment(0, 1, None, None)], "cpu"),
    )
    query, key = draw(1, HEADS, WIDTH), draw(1, KV_HEADS, WIDTH)
    with pytest.raises(AssertionError, match="sliding layers"):
        attend(query, key, key, batch, 0, windowed=True)


def test_layers_may_keep_heads_of_different_shapes() -> None:
    store = KVStore.allocate(shapes=((2, 16), (1, 32)), num_slots=5, dtype=torch.bfloat16, device="cpu")
    assert [tuple(layer.shape) for layer in store.keys] == [(5, 2, 16), (5, 1, 32)]
    assert [tuple(layer.shape) for layer in store.values] == [(5, 2, 16), (5, 1, 32)]
