"""Replays LLaDA's logits cases with a cache: parts of a canvas are fed over kept keys and values of the rest.

Every fed token writes its slot; what a reference does not keep is never seen again, or written anew first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.engine.build import Loaded
from sfumato.models.batch import Batch, KVStore, Segment, group_segments
from tests.goldens.cases import Case
from tests.goldens.replay import load_checkpoint
from tests.goldens.tensors import expect_recorded

_TOLERANCE = 2e-3


class CachedCanvas:
    """A canvas with one slot for each position."""

    def __init__(self, loaded: Loaded, length: int) -> None:
        self.model, self.length = loaded.model, length
        self.store = KVStore.allocate(
            shapes=loaded.traits.layer_kv_shapes, num_slots=length, dtype=torch.float32, device="cpu"
        )

    def feed(self, canvas: list[list[int]], start: int, end: int) -> Tensor:
        """Return logits [1, end - start, V] of positions [start, end), which see the whole canvas."""
        positions = torch.arange(start, end)
        segment = Segment(0, end - start, torch.arange(self.length), None)
        batch = Batch(
            token_ids=torch.tensor(canvas[0])[start:end],
            positions=positions,
            groups=group_segments([segment], "cpu"),
            store=self.store,
            write_slots=positions,
            write_tokens=torch.arange(end - start),
        )
        return self.model.head(self.model.hidden(batch))[None]


@torch.inference_mode()
def replay_prefix(case: Case) -> None:
    """Replay `logits_prefix_kv`: the prefix is kept from the first canvas, the rest is fed again."""
    length, start = len(case["canvas_a"][0]), case["prefix_len"]
    cached = CachedCanvas(load_checkpoint(case.checkpoint_path), length)
    found = {"logits_a": cached.feed(case["canvas_a"], 0, length)}
    found["logits_suffix_b"] = cached.feed(case["canvas_b"], start, length)
    expect_recorded(case, found, _TOLERANCE, given=())


@torch.inference_mode()
def replay_dual(case: Case) -> None:
    """Replay `logits_dual_kv`: everything but the block is kept from the first canvas."""
    length, start, end = len(case["canvas_a"][0]), case["block_start"], case["block_end"]
    cached = CachedCanvas(load_checkpoint(case.checkpoint_path), length)
    cached.feed(case["canvas_a"], 0, length)
    found = {"logits_block_b": cached.feed(case["canvas_b"], start, end)}
    found["logits_block_c"] = cached.feed(case["canvas_c"], start, end)
    expect_recorded(case, found, _TOLERANCE, given=())


@torch.inference_mode()
def replay_append(case: Case) -> None:
    """Replay `logits_kv_append`: the prefix is kept from the first canvas, the appended from the second."""
    length, start = len(case["canvas_a"][0]), case["prefix_len"]
    cached = CachedCanvas(load_checkpoint(case.checkpoint_path), length)
    found = {"logits_a": cached.feed(case["canvas_a"], 0, length)}
    found["logits_suffix_b"] = cached.feed(case["canvas_b"], start, length)
    found["logits_suffix_c"] = cached.feed(case["canvas_c"], start + case["append_len"], length)
    expect_recorded(case, found, _TOLERANCE, given=())
