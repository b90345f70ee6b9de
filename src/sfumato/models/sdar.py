"""SDAR (`SDARForCausalLM`): a Qwen3-like decoder with block-causal attention, blocks counted from position 0.

Source: JetAstra/SDAR (arXiv:2510.06303). Checkpoint names are those of the published dense models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.core.traits import BlockOrigin, ModelTraits, Visibility
from sfumato.errors import CheckpointError
from sfumato.models.checkpoint_names import Target, stacked
from sfumato.models.config_fields import Fields
from sfumato.models.decoder import Decoder, DecoderShape

ARCHITECTURE = "SDARForCausalLM"

_MASK_TOKEN = "<|MASK|>"
# The published SDAR-Chat files name neither the mask id nor the block length.
_KNOWN_MASK_ID = 151669
_KNOWN_BLOCK_LENGTH = 4
_FIXED = {"hidden_act": "silu", "use_sliding_window": False, "rope_scaling": None}


def shape_from_hf(config: Mapping[str, Any]) -> DecoderShape:
    """Translate config.json; raises CheckpointError naming a missing or unsupported field."""
    fields = Fields(config)
    for name, value in _FIXED.items():
        fields.expect(name, value)
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    kv_heads = fields.optional_integer("num_key_value_heads") or heads
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    return DecoderShape(
        num_layers=fields.integer("num_hidden_layers"),
        width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.optional_integer("head_dim") or width // heads,
        inner=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        rope_theta=fields.number("rope_theta", 10000.0),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        qk_norm=True,
        attention_bias=bool(config.get("attention_bias", False)),
        wide_norm=True,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def traits_from_hf(config: Mapping[str, Any], added_tokens: Mapping[str, int]) -> ModelTraits:
    """Declare the model; mask id and block length fall back to the tokenizer's and the family's values."""
    shape, fields = shape_from_hf(config), Fields(config)
    mask = fields.optional_integer("mask_token_id")
    if mask is None:
        mask = fields.from_tokenizer("mask_token_id", added_tokens, (_MASK_TOKEN, "<|mask|>"), _KNOWN_MASK_ID)
    return ModelTraits(
        family="sdar",
        architecture=ARCHITECTURE,
        vocab_size=shape.vocab_size,
        mask_token_id=mask,
        eos_token_ids=fields.token_ids("eos_token_id"),
        eot_token_id=added_tokens.get("<|im_end|>"),
        context_length=fields.integer("max_position_embeddings"),
        block_length=fields.optional_integer("block_size") or _KNOWN_BLOCK_LENGTH,
        visibility=Visibility.BLOCK_CAUSAL,
        block_origin=BlockOrigin.START,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        default_algorithm="sdar",
    )


def targets(shape: DecoderShape) -> dict[str, Target]:
    """Return every tensor of a checkpoint and where it goes."""
    width, row = shape.width, (shape.width,)
    query_rows, kv_rows = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    qkv = [("q_proj", query_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)]
    found = {
        "model.embed_tokens.weight": Target("embedding", (shape.vocab_size, width)),
        "model.norm.weight": Target("norm.weight", row),
    }
    if not shape.tied:
        found["lm_head.weight"] = Target("output.weight", (shape.vocab_size, width))
    for index in range(shape.num_layers):
        theirs, ours = f"model.layers.{index}.", f"layers.{index}."
        for kind, tail in (("weight", row), *((("bias", ()),) if shape.attention_bias else ())):
            parts = [(f"{theirs}self_attn.{name}.{kind}", rows) for name, rows in qkv]
            found |= stacked(f"{ours}attention.qkv.{kind}", parts, tail)
        if shape.attention_bias:
            found[f"{theirs}self_attn.o_proj.bias"] = Target(f"{ours}attention.out.bias", row)
        found[f"{theirs}self_attn.o_proj.weight"] = Target(f"{ours}attention.out.weight", (width, query_rows))
        found[f"{theirs}self_attn.q_norm.weight"] = Target(
            f"{ours}attention.query_norm.weight", (shape.head_dim,)
        )
        found[f"{theirs}self_attn.k_norm.weight"] = Target(
            f"{ours}attention.key_norm.weight", (shape.head_dim,)
        )
        gate_up = [(f"{theirs}mlp.{name}.weight", shape.inner) for name in ("gate_proj", "up_proj")]
        found |= stacked(f"{ours}mlp.gate_up.weight", gate_up, row)
        found[f"{theirs}mlp.down_proj.weight"] = Target(f"{ours}mlp.down.weight", (width, shape.inner))
        found[f"{theirs}input_layernorm.weight"] = Target(f"{ours}attention_norm.weight", row)
        found[f"{theirs}post_attention_layernorm.weight"] = Target(f"{ours}mlp_norm.weight", row)
    return found


def build(shape: DecoderShape) -> Decoder:
    """Make the module; on the meta device it takes no memory."""
    return Decoder(shape)
