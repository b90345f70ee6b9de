"""Replays DiffusionGemma's logits cases: a context encoded causally, canvases denoised over its cache."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.core.traits import ModelTraits
from sfumato.models.batch import Batch, KVStore, Segment, group_segments
from tests.goldens.cases import Case
from tests.goldens.replay import load_checkpoint
from tests.goldens.tensors import expect_recorded, named_layers

# The README's independent implementation stays within 7e-5.
_TOLERANCE = 2e-4
_INPUTS = ("input_ids", "canvas", "committed_canvas", "canvas2", "self_conditioning_temperature")


@torch.inference_mode()
def replay_encoder_and_decoder(case: Case) -> None:
    """Encode the prompt, denoise a canvas twice, encode what was committed, denoise the next canvas."""
    loaded = load_checkpoint(case.checkpoint_path)
    model, traits, recorded = loaded.model, loaded.traits, case.tensors
    prompt, canvas = recorded["input_ids"], recorded["canvas"]
    cached, length = len(prompt), len(canvas)
    store = KVStore.allocate(
        shapes=traits.layer_kv_shapes, num_slots=cached + 2 * length, dtype=torch.float32, device="cpu"
    )
    encoded: list[Tensor] = []
    denoised: list[Tensor] = []
    found = {
        "encoder_last_hidden": model.hidden(context_batch(prompt, 0, store, traits), encoded),
        **named_layers(store, cached),
    }
    first = model.head(model.hidden(canvas_batch(canvas, cached, store, traits), denoised))
    found |= {f"encoder_hidden_{layer}": hidden for layer, hidden in enumerate(encoded)}
    found |= {f"decoder_hidden_{layer}": hidden for layer, hidden in enumerate(denoised)}
    found["logits_no_self_conditioning"] = first
    # The reference conditions on what it recorded.
    processed = recorded["logits_no_self_conditioning"] / recorded["self_conditioning_temperature"]
    addend = model.soft_embedding(processed.softmax(-1))
    conditioned = canvas_batch(canvas, cached, store, traits, addend)
    found["logits_self_conditioned"] = model.head(model.hidden(conditioned))
    model.hidden(context_batch(recorded["committed_canvas"], cached, store, traits))
    second = canvas_batch(recorded["canvas2"], cached + length, store, traits)
    found["logits_canvas2"] = model.head(model.hidden(second))
    expect_recorded(case, found, _TOLERANCE, given=_INPUTS)


def context_batch(ids: Tensor, start: int, store: KVStore, traits: ModelTraits) -> Batch:
    """Return a batch that encodes ids at positions from start on: each sees itself and what lies before."""
    assert traits.window is not None
    positions = torch.arange(start, start + len(ids))
    slots, ends = torch.arange(start + len(ids)), positions + 1
    return _batch(
        ids,
        positions,
        store,
        seen=Segment(0, len(ids), slots, ends),
        seen_in_window=Segment(0, len(ids), slots, ends, (ends - traits.window).clamp(min=0)),
        is_context=torch.ones_like(ids, dtype=torch.bool),
    )


def canvas_batch(
    ids: Tensor, start: int, store: KVStore, traits: ModelTraits, addend: Tensor | None = None
) -> Batch:
    """Return a batch that denoises a canvas behind `start` cached tokens: all of it sees all of it."""
    assert traits.window is not None
    slots = torch.arange(start + len(ids))
    first = torch.full_like(ids, max(0, start - (traits.window - 1)))
    return _batch(
        ids,
        torch.arange(start, start + len(ids)),
        store,
        seen=Segment(0, len(ids), slots, None),
        seen_in_window=Segment(0, len(ids), slots, None, first),
        is_context=None,
        addend=addend,
    )


def _batch(
    ids: Tensor,
    positions: Tensor,
    store: KVStore,
    *,
    seen: Segment,
    seen_in_window: Segment,
    is_context: Tensor | None,
    addend: Tensor | None = None,
) -> Batch:
    return Batch(
        token_ids=ids,
        positions=positions,
        groups=group_segments([seen], "cpu"),
        windowed=group_segments([seen_in_window], "cpu"),
        store=store,
        write_slots=positions,
        write_tokens=torch.arange(len(ids)),
        is_context=is_context,
        addend=addend,
    )
