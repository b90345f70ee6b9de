"""The naive loops that the engine is measured against, and tested against: the references' own procedure.

One request at a time, the whole canvas recomputed every step, every position through the output head.
Letters: L canvas positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.models.batch import Batch, KVStore, Segment, group_segments
from sfumato.models.decoder import Decoder


@dataclass
class NaiveResult:
    """The canvas i64[L] at the end and the forwards it took."""

    canvas: Tensor
    num_forwards: int


def whole_canvas_logits(model: Decoder, canvas: Tensor, block_length: int | None) -> Tensor:
    """Return logits f32[L, V] of one forward; block-causal from position 0, or bidirectional (None)."""
    length = len(canvas)
    positions = torch.arange(length)
    store = slots = ends = None
    if block_length is not None:
        slots, ends = positions, (positions // block_length + 1) * block_length
        store = KVStore.allocate(
            shapes=model.shape.kv_shapes, num_slots=length, dtype=model.dtype, device=str(model.device)
        )
    segment = Segment(start=0, length=length, key_slots=slots, visible_end=ends)
    batch = Batch(
        token_ids=canvas,
        positions=positions,
        groups=group_segments([segment], model.device),
        store=store,
        write_slots=slots,
        write_tokens=slots,
    )
    return model.head(model.hidden(batch)).float()


@torch.inference_mode()
def llada_generate(
    model: Decoder,
    prompt: list[int],
    *,
    mask_id: int,
    steps: int,
    gen_length: int,
    block_length: int,
    threshold: float | None = None,
    eos_id: int | None = None,
) -> NaiveResult:
    """Decode as LLaDA's generate does, or as Fast-dLLM's with a threshold (eos_id: dInfer's early stop)."""
    canvas = torch.tensor([*prompt, *[mask_id] * gen_length])
    steps_per_block = steps // (gen_length // block_length)
    forwards = 0
    for start in range(len(prompt), len(canvas), block_length):
        num_masks = int((canvas[start : start + block_length] == mask_id).sum())
        step = 0
        while (canvas[start : start + block_length] == mask_id).any():
            logits = whole_canvas_logits(model, canvas, None)
            token = logits.argmax(-1)
            confidence = logits.softmax(-1).gather(-1, token[:, None]).squeeze(-1)
            eligible = canvas == mask_id
            eligible[start + block_length :] = False
            confidence = torch.where(eligible, confidence, -torch.inf)
            count = num_masks // steps_per_block + (step < num_masks % steps_per_block)
            if threshold is not None:
                count = max(1, int((confidence >= threshold).sum()))
            chosen = confidence.topk(min(count, int(eligible.sum()))).indices
            canvas[chosen] = token[chosen]
            forwards, step = forwards + 1, step + 1
            ends = torch.nonzero(canvas == eos_id).flatten() if eos_id is not None else torch.empty(0)
            if len(ends):
                canvas[int(ends[0]) + 1 :] = eos_id
        if eos_id is not None and (canvas == eos_id).any():
            break
    return NaiveResult(canvas, forwards)


@torch.inference_mode()
def sdar_generate(
    model: Decoder,
    prompt: list[int],
    *,
    mask_id: int,
    gen_length: int,
    block_length: int,
    steps_per_block: int,
) -> NaiveResult:
    """Decode as SDAR's generate does with static low-confidence remasking, without any cache."""
    length = -(-(len(prompt) + gen_length) // block_length) * block_length
    canvas = torch.tensor([*prompt, *[mask_id] * (length - len(prompt))])
    forwards = 0
    for start in range(len(prompt) // block_length * block_length, length, block_length):
        step = 0
        while (canvas[start : start + block_length] == mask_id).any():
            logits = whole_canvas_logits(model, canvas, block_length)
            token = logits.argmax(-1)
            confidence = logits.softmax(-1).gather(-1, token[:, None]).squeeze(-1)
            eligible = canvas == mask_id
            eligible[:start] = False
            eligible[start + block_length :] = False
            confidence = torch.where(eligible, confidence, -torch.inf)
            count = block_length // steps_per_block + (step < block_length % steps_per_block)
            chosen = confidence.topk(min(count, int(eligible.sum()))).indices
            canvas[chosen] = token[chosen]
            forwards, step = forwards + 1, step + 1
    return NaiveResult(canvas, forwards)


@torch.inference_mode()
def dual_cache_generate(
    model: Decoder, prompt: list[int], *, mask_id: int, steps: int, gen_length: int, block_length: int
) -> NaiveResult:
    """Decode as Fast-dLLM's dual cache does, on a schedule: a block's first forward covers the canvas.

    Its keys and values are kept on both sides of the block; later forwards feed the block alone and put its
    keys and values in place of the old ones.
    """
    canvas = torch.tensor([*prompt, *[mask_id] * gen_length])
    store = KVStore.allocate(
        shapes=model.shape.kv_shapes, num_slots=len(canvas), dtype=model.dtype, device=str(model.device)
    )
    steps_per_block = steps // (gen_length // block_length)
    forwards = 0
    for start in range(len(prompt), len(canvas), block_length):
        block = canvas[start : start + block_length]
        for step in range(steps_per_block):
            is_masked = block == mask_id
            if step == 0:
                logits = _slice_logits(model, canvas, 0, len(canvas), store)[start : start + block_length]
            else:
                logits = _slice_logits(model, canvas, start, start + block_length, store)
            forwards += 1
            confidence, token = logits.softmax(-1).max(-1)
            count = block_length // steps_per_block + (step < block_length % steps_per_block)
            chosen = confidence.masked_fill(~is_masked, -torch.inf).topk(min(count, int(is_masked.sum())))
            block[chosen.indices] = token[chosen.indices]
    return NaiveResult(canvas, forwards)


def _slice_logits(model: Decoder, canvas: Tensor, start: int, stop: int, store: KVStore) -> Tensor:
    """Return logits f32[stop - start, V] of a slice that writes to the store and sees all of it."""
    positions = torch.arange(start, stop)
    segment = Segment(0, stop - start, key_slots=torch.arange(len(canvas)), visible_end=None)
    batch = Batch(
        token_ids=canvas[start:stop],
        positions=positions,
        groups=group_segments([segment], model.device),
        store=store,
        write_slots=positions,
        write_tokens=positions - start,
    )
    return model.head(model.hidden(batch)).float()
