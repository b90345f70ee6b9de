"""DiffusionGemma against transformers' class, and its two kinds of tokens in one forward."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.core.traits import ModelTraits
from sfumato.errors import CheckpointError, ConfigError
from sfumato.models.batch import Batch, Segment, group_segments
from sfumato.models.folder import Overrides, resolve_traits
from sfumato.models.weights import build_on_meta
from tests.goldens.logits_gemma import canvas_batch, context_batch
from tests.models.checkpoints import GEMMA, allocate, load, random_weights, write

# A part of a real checkpoint that text does not need.
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1,
          "head_dim": 16, "global_head_dim": 16, "num_hidden_layers": 1, "patch_size": 2,
          "position_embedding_size": 16, "pooling_kernel_size": 1, "model_type": "gemma4_vision"}  # fmt: skip


def changed(text: dict[str, Any], whole: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the small configuration with other fields; None takes a field away."""
    config = copy.deepcopy(GEMMA) | (whole or {})
    config["text_config"] |= text
    config["text_config"] = {
        name: value for name, value in config["text_config"].items() if value is not None
    }
    return config


def declared(config: dict[str, Any]) -> ModelTraits:
    """Return a configuration's traits."""
    return resolve_traits(config, {}, {}, Overrides())


def draw_ids(length: int, seed: int) -> Tensor:
    """Return seeded token ids."""
    return torch.randint(0, 90, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("text", "prompt_length"),
    [
        ({}, 3),
        ({}, 11),
        ({"sliding_window": 20}, 11),
        ({"num_key_value_heads": 4, "per_layer_config": {"2": {"head_dim": 8, "num_key_value_heads": 2}}}, 9),
        ({"num_key_value_heads": 1, "top_k_experts": 6, "num_hidden_layers": 1,
          "layer_types": ["full_attention"], "per_layer_config": {"0": {"head_dim": 32}}}, 6),
        ({"per_layer_config": None, "global_head_dim": 64, "num_global_key_value_heads": 1}, 7),
    ],
)  # fmt: skip
def test_it_is_transformers_model(tmp_path: Path, text: dict[str, Any], prompt_length: int) -> None:
    pytest.importorskip("transformers.models.diffusion_gemma")
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    config = changed(text)
    weights = random_weights(config)
    foreign = DiffusionGemmaConfig(**copy.deepcopy(config), vision_config=VISION)
    foreign._attn_implementation = "eager"
    reference = DiffusionGemmaForBlockDiffusion(foreign).eval()
    left = reference.load_state_dict(weights, strict=False)
    reference.tie_weights()
    assert not left.unexpected_keys
    prompt, canvas = draw_ids(prompt_length, 1), draw_ids(8, 2)
    with torch.inference_mode():
        first = reference(input_ids=prompt[None], decoder_input_ids=canvas[None]).logits
        conditions = first / 0.7
        second = reference(
            input_ids=prompt[None], decoder_input_ids=canvas[None], self_conditioning_logits=conditions
        ).logits
        model, traits = load(write(tmp_path, config, weights)), declared(config)
        store = allocate(model, prompt_length + 8)
        model.hidden(context_batch(prompt, 0, store, traits))
        found = model.head(model.hidden(canvas_batch(canvas, prompt_length, store, traits)))
        addend = model.soft_embedding(conditions[0].softmax(-1))
        again = model.head(model.hidden(canvas_batch(canvas, prompt_length, store, traits, addend)))
    torch.testing.assert_close(found, first[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, second[0], atol=1e-4, rtol=1e-4)
    assert float((found - again).abs().max()) > 1e-2


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A small model."""
    return load(write(tmp_path / "model", GEMMA, random_weights(GEMMA)))


def test_context_and_canvas_of_different_rows_share_a_forward(model: Any) -> None:
    traits = declared(GEMMA)
    prompt, other, canvas = draw_ids(9, 3), draw_ids(6, 4), draw_ids(8, 5)
    addend = model.soft_embedding((draw_ids(8 * 90, 6).view(8, 90) / 9).softmax(-1))
    # The final norm would hide a wrong factor of the last layer, but not a wrong sign.
    model.layers[-1].context_scalar.neg_()
    with torch.inference_mode():
        alone = allocate(model, 40)
        model.hidden(context_batch(prompt, 0, alone, traits))
        expected_canvas = model.hidden(canvas_batch(canvas, 9, alone, traits, addend))
        expected_context = model.hidden(context_batch(other, 0, allocate(model, 6), traits))
        joint = allocate(model, 40)
        model.hidden(context_batch(prompt, 0, joint, traits))
        batch = join(context_batch(other, 20, joint, traits), canvas_batch(canvas, 9, joint, traits, addend))
        # The other row's slots lie behind the first one's.
        batch = replace(batch, positions=torch.cat((torch.arange(6), torch.arange(9, 17))), **segments())
        found = model.hidden(batch)
        narrow = model.hidden(replace(batch, output_tokens=torch.tensor([13, 2, 6])))
    torch.testing.assert_close(found[:6], expected_context, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[6:], expected_canvas, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(narrow, found[[13, 2, 6]], atol=1e-5, rtol=1e-5)


def segments() -> dict[str, Any]:
    """Return the groups of six context tokens at slots 20 to 25, and a canvas at slots 9 to 16."""
    ends = torch.arange(1, 7)
    full = [Segment(0, 6, torch.arange(20, 26), ends), Segment(6, 8, torch.arange(17), None)]
    window = [
        Segment(0, 6, torch.arange(20, 26), ends, (ends - 5).clamp(min=0)),
        Segment(6, 8, torch.arange(17), None, torch.full((8,), 5)),
    ]
    return {"groups": group_segments(full, "cpu"), "windowed": group_segments(window, "cpu")}


def join(context: Batch, canvas: Batch) -> Batch:
    """Pack a canvas behind a context; the caller says what they see."""
    assert context.write_slots is not None
    assert canvas.write_slots is not None
    assert context.is_context is not None
    assert canvas.addend is not None
    length, canvas_length = len(context.token_ids), len(canvas.token_ids)
    return replace(
        context,
        token_ids=torch.cat((context.token_ids, canvas.token_ids)),
        write_slots=torch.cat((context.write_slots, canvas.write_slots)),
        write_tokens=torch.arange(length + canvas_length),
        is_context=torch.cat((context.is_context, torch.zeros(canvas_length, dtype=torch.bool))),
        addend=torch.cat((torch.full((length, canvas.addend.shape[1]), torch.nan), canvas.addend)),
    )


def test_what_it_declares() -> None:
    traits = declared(GEMMA)
    assert (traits.mask_token_id, traits.has_mask_token) == (-1, False)
    assert (traits.block_length, traits.fixed_block_length, traits.window) == (8, True, 5)
    assert traits.eos_token_ids == (1, 5)
    assert traits.layer_kv_shapes == ((2, 16), (2, 16), (1, 32))
    assert traits.kv_bytes_per_token(2) == 2 * 2 * (32 + 32 + 32)
    assert traits.context_granularity == 1


def test_logits_stay_below_the_soft_cap(model: Any) -> None:
    logits = model.head(torch.full((1, 48), 1e4))
    assert float(logits.abs().max()) <= 30
    config = changed({"final_logit_softcapping": 2.0})
    assert build_on_meta(config)[0].shape.soft_cap == 2.0  # type: ignore[attr-defined]


def test_an_operator_cannot_change_the_canvas_or_invent_a_mask() -> None:
    assert resolve_traits(GEMMA, {}, {}, Overrides(block_length=8)).block_length == 8
    with pytest.raises(ConfigError, match="--block-length 16: this model's blocks have 8"):
        resolve_traits(GEMMA, {}, {}, Overrides(block_length=16))
    with pytest.raises(ConfigError, match="no mask token"):
        resolve_traits(GEMMA, {}, {}, Overrides(mask_token_id=4))


def test_everything_that_is_missing_is_named_at_once() -> None:
    cut = changed({"num_experts": None, "sliding_window": None, "vocab_size": None})
    names = ", ".join(f"'text_config.{name}'" for name in ("num_experts", "sliding_window", "vocab_size"))
    with pytest.raises(CheckpointError, match=f"fields {names} are missing"):
        declared(cut)
    with pytest.raises(CheckpointError, match="fields 'canvas_length', 'text_config' are missing"):
        declared({"architectures": GEMMA["architectures"]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers"),
        ({"per_layer_config": {"2": {"sliding_window": 3}}}, "per_layer_config.2"),
        ({"per_layer_config": None}, "text_config.global_head_dim' is missing"),
        ({"hidden_activation": "silu"}, "text_config.hidden_activation = 'silu'"),
        ({"top_k_experts": 7}, "top_k_experts' is 7"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.sliding_attention' is missing"),
        ({"num_key_value_heads": 3}, "num_attention_heads' is 4"),
    ],
)
def test_a_wrong_configuration_is_named(text: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        declared(changed(text))


def test_what_sees_images_is_ignored_and_nothing_else(tmp_path: Path) -> None:
    weights = random_weights(GEMMA)
    extra = {"model.encoder.vision_tower.x.weight": torch.zeros(2), "lm_head.weight": torch.zeros(2)}
    load(write(tmp_path / "a", GEMMA | {"vision_config": VISION}, weights | extra))
    with pytest.raises(CheckpointError, match=r"model\.encoder\.audio\.weight' is not part"):
        load(write(tmp_path / "b", GEMMA, weights | {"model.encoder.audio.weight": torch.zeros(2)}))


def test_a_published_generation_file_sets_the_sampler() -> None:
    generation = {
        "max_denoising_steps": 20,
        "sampler_config": {"entropy_bound": 0.3, "_cls_name": "EntropyBoundSamplerConfig"},
        "t_min": 0.1,
        "t_max": None,
        "confidence_threshold": 0.01,
        "max_new_tokens": 64,
    }
    traits = resolve_traits(GEMMA, generation, {}, Overrides())
    assert traits.default_algorithm == "entropy_bound"
    assert traits.default_parameters == {
        "max_denoising_steps": 20,
        "entropy_bound": 0.3,
        "t_min": 0.1,
        "confidence_threshold": 0.01,
    }
    assert traits.default_max_tokens == 64
