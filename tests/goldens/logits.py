"""Replays logits cases through the model class: full sequences, padded batches, block-causal sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.core.traits import Visibility
from sfumato.engine.build import Loaded
from sfumato.models.batch import Batch, KVStore, Segment, group_segments
from sfumato.models.language_model import LanguageModel
from tests.goldens.cases import Case
from tests.goldens.logits_gemma import replay_encoder_and_decoder
from tests.goldens.replay import load_checkpoint
from tests.goldens.tensors import expect_close, expect_recorded, named_layers

# The READMEs' tolerances. SDAR states none: its independent implementation stays within 2e-5.
_LLADA_TOLERANCE = 2e-3
_DREAM_TOLERANCE = 2e-4
_BLOCK_CAUSAL_TOLERANCE = 1e-4


@torch.inference_mode()
def replay_full(case: Case) -> None:
    """Replay `logits_full`: a batch of whole sequences, each seeing all of itself."""
    loaded = load_checkpoint(case.checkpoint_path)
    ids = case.tensors["input_ids"] if "input_ids" in case.tensors else torch.tensor(case["input_ids"])
    trace: list[Tensor] = []
    logits = forward_rows(loaded.model, list(ids.reshape(-1, ids.shape[-1])), trace)
    expect_close("logits", logits, case.tensors["logits"].flatten(0, -2), _LLADA_TOLERANCE)
    if "hidden_states" in case.tensors:
        for layer, hidden in enumerate(case.tensors["hidden_states"]):
            expect_close(f"hidden state {layer}", trace[layer], hidden.flatten(0, -2), _LLADA_TOLERANCE)


@torch.inference_mode()
def replay_padded(case: Case) -> None:
    """Replay `logits_padded`: a padded batch is its rows; with the mask ignored, padding is text."""
    loaded = load_checkpoint(case.checkpoint_path)
    ids, mask = torch.tensor(case["input_ids"]), torch.tensor(case["attention_mask"]).bool()
    rows = [row[keep] for row, keep in zip(ids, mask, strict=True)]
    expect_close(
        "logits of the rows",
        forward_rows(loaded.model, rows),
        case.tensors["logits_masked"][mask],
        _LLADA_TOLERANCE,
    )
    expect_close(
        "logits with the mask ignored",
        forward_rows(loaded.model, list(ids)),
        case.tensors["logits_mask_ignored"].flatten(0, -2),
        _LLADA_TOLERANCE,
    )


def forward_rows(model: LanguageModel, rows: list[Tensor], trace: list[Tensor] | None = None) -> Tensor:
    """Return the logits of rows that see exactly themselves, one after another."""
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


def replay_logits(case: Case) -> None:
    """Replay `logits`, which each family records in its own way."""
    traits = load_checkpoint(case.checkpoint_path).traits
    if traits.context_granularity == 1:
        replay_encoder_and_decoder(case)
    elif traits.visibility is Visibility.BIDIRECTIONAL:
        _replay_bidirectional(case)
    else:
        _replay_block_causal(case)


@torch.inference_mode()
def _replay_bidirectional(case: Case) -> None:
    """Compare raw logits, not shifted; a padded batch is its rows."""
    loaded = load_checkpoint(case.checkpoint_path)
    ids, expected = torch.tensor(case["input_ids"]), case.tensors["logits"]
    valid = case.tensors["valid"] if "valid" in case.tensors else torch.ones_like(ids, dtype=torch.bool)
    rows = [row[keep] for row, keep in zip(ids, valid, strict=True)]
    expect_close("logits", forward_rows(loaded.model, rows), expected[valid], _DREAM_TOLERANCE)


@torch.inference_mode()
def _replay_block_causal(case: Case) -> None:
    """Compare one forward whose queries see to the end of their blocks."""
    block = case["params"]["block_size"]
    loaded = load_checkpoint(case.checkpoint_path, block_length=block)
    ids = case.tensors["input_ids"].long()
    length = len(ids)
    positions = torch.arange(length)
    store = KVStore.allocate(
        shapes=loaded.traits.layer_kv_shapes, num_slots=length, dtype=torch.float32, device="cpu"
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
    found = {"logits": loaded.model.head(loaded.model.hidden(batch, trace)), **named_layers(store, length)}
    found |= {f"hidden_{layer}": hidden for layer, hidden in enumerate(trace)}
    if "layer1_mlp_input" in case.tensors:
        found |= _run_experts(case, loaded)
    expect_recorded(case, found, _BLOCK_CAUSAL_TOLERANCE, given=("input_ids", "layer1_mlp_input"))


def _run_experts(case: Case, loaded: Loaded) -> dict[str, Tensor]:
    """Run the first layer with experts on its recorded input; each token's experts in the recorded order."""
    mlp = loaded.model.get_submodule("layers.1.mlp")
    given, expected = case.tensors["layer1_mlp_input"], case.tensors["layer1_topk_idx"]
    chosen, weights = mlp.router(given)
    # The order of a token's experts means nothing, so ours follow theirs where they are the same.
    order, back = chosen.argsort(-1), expected.argsort(-1).argsort(-1)
    return {
        "layer1_router_logits": mlp.router.logits(given),
        "layer1_topk_idx": chosen.gather(-1, order).gather(-1, back),
        "layer1_topk_weight": weights.gather(-1, order).gather(-1, back),
        "layer1_mlp_output": mlp(given),
    }
