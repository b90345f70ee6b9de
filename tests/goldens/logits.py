"""Replays logits cases through the model class: full sequences, padded batches, block-causal sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.models.batch import Batch, KVStore, Segment, group_segments
from sfumato.models.decoder import Decoder
from tests.goldens.cases import Case
from tests.goldens.replay import Mismatch, load_checkpoint

# The READMEs' tolerances: LLaDA states 2e-3; SDAR's independent implementation stays within 2e-5.
_LLADA_TOLERANCE = 2e-3
_BLOCK_CAUSAL_TOLERANCE = 1e-4


@torch.inference_mode()
def replay_full(case: Case) -> None:
    """Replay `logits_full`: a batch of whole sequences, each seeing all of itself."""
    loaded = load_checkpoint(case.checkpoint_path)
    ids = case.tensors["input_ids"] if "input_ids" in case.tensors else torch.tensor(case["input_ids"])
    trace: list[Tensor] = []
    logits = _forward(loaded.model, list(ids.reshape(-1, ids.shape[-1])), trace)
    _expect_close("logits", logits, case.tensors["logits"].flatten(0, -2), _LLADA_TOLERANCE)
    if "hidden_states" in case.tensors:
        for layer, hidden in enumerate(case.tensors["hidden_states"]):
            _expect_close(f"hidden state {layer}", trace[layer], hidden.flatten(0, -2), _LLADA_TOLERANCE)


@torch.inference_mode()
def replay_padded(case: Case) -> None:
    """Replay `logits_padded`: a padded batch is its rows; with the mask ignored, padding is text."""
    loaded = load_checkpoint(case.checkpoint_path)
    ids, mask = torch.tensor(case["input_ids"]), torch.tensor(case["attention_mask"]).bool()
    rows = [row[keep] for row, keep in zip(ids, mask, strict=True)]
    _expect_close(
        "logits of the rows",
        _forward(loaded.model, rows),
        case.tensors["logits_masked"][mask],
        _LLADA_TOLERANCE,
    )
    _expect_close(
        "logits with the mask ignored",
        _forward(loaded.model, list(ids)),
        case.tensors["logits_mask_ignored"].flatten(0, -2),
        _LLADA_TOLERANCE,
    )


def _forward(model: Decoder, rows: list[Tensor], trace: list[Tensor] | None = None) -> Tensor:
    starts = [sum(len(row) for row in rows[:index]) for index in range(len(rows))]
    segments = [
        Segment(start=start, length=len(row), key_slots=None, visible_end=None)
        for start, row in zip(starts, rows, strict=True)
    ]
    batch = Batch(
        token_ids=torch.cat(rows),
        positions=torch.cat([torch.arange(len(row)) for row in rows]),
        groups=group_segments(segments, "cpu"),
    )
    return model.head(model.hidden(batch, trace))


@torch.inference_mode()
def replay_block_causal(case: Case) -> None:
    """Replay `logits` of a block-causal model: one forward whose queries see to the end of their blocks."""
    block = case["params"]["block_size"]
    loaded = load_checkpoint(case.checkpoint_path, block_length=block)
    model, traits = loaded.model, loaded.traits
    ids = case.tensors["input_ids"].long()
    length = len(ids)
    positions = torch.arange(length)
    store = KVStore.allocate(
        num_layers=traits.num_layers,
        num_slots=length,
        num_heads=traits.num_kv_heads,
        head_dim=traits.head_dim,
        dtype=torch.float32,
        device="cpu",
    )
    ends = ((positions // block + 1) * block).clamp(max=length)
    segment = Segment(start=0, length=length, key_slots=positions, visible_end=ends)
    batch = Batch(
        token_ids=ids,
        positions=positions,
        groups=group_segments([segment], "cpu"),
        store=store,
        write_slots=positions,
        write_tokens=positions,
    )
    trace: list[Tensor] = []
    logits = model.head(model.hidden(batch, trace))
    _expect_close("logits", logits, case.tensors["logits"], _BLOCK_CAUSAL_TOLERANCE)
    for layer, hidden in enumerate(trace):
        if f"hidden_{layer}" in case.tensors:
            _expect_close(f"hidden {layer}", hidden, case.tensors[f"hidden_{layer}"], _BLOCK_CAUSAL_TOLERANCE)
    for name, kept in (("k", store.keys[0]), ("v", store.values[0])):
        if f"kv_layer0_{name}" in case.tensors:
            expected = case.tensors[f"kv_layer0_{name}"].transpose(0, 1)
            _expect_close(f"layer 0 {name}", kept, expected, _BLOCK_CAUSAL_TOLERANCE)


def _expect_close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    if found.shape != expected.shape:
        raise Mismatch(f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}")
    worst = float((found.float() - expected.float()).abs().max())
    if not worst <= tolerance:
        raise Mismatch(f"{what}: off by {worst:.2e}, allowed {tolerance:.0e}")
