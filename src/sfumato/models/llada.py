"""LLaDA (`LLaDAModelLM`): a bidirectional Llama-like decoder, logits at their own positions.

Source: ML-GSAI/LLaDA (arXiv:2502.09992). Checkpoint names are those of the published 8B models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.core.traits import BlockOrigin, ModelTraits, Visibility
from sfumato.errors import CheckpointError
from sfumato.models.checkpoint_names import Target, stacked
from sfumato.models.config_fields import Fields
from sfumato.models.decoder import Decoder, DecoderShape

ARCHITECTURE = "LLaDAModelLM"

# Values of the one variant that was ever published; another value means another forward pass.
_FIXED = {
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "input_emb_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "scale_logits": False,
}
# The published models generate 32-token blocks; no field of config.json says so.
_BLOCK_LENGTH = 32
_EOT_TOKEN = "<|eot_id|>"


def shape_from_hf(config: Mapping[str, Any]) -> DecoderShape:
    """Translate config.json; raises CheckpointError naming a missing or unsupported field."""
    fields = Fields(config)
    for name, value in _FIXED.items():
        fields.expect(name, value)
    heads, width = fields.integer("n_heads"), fields.integer("d_model")
    kv_heads = fields.optional_integer("n_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if config.get("multi_query_attention") else heads
    vocab_size = fields.optional_integer("embedding_size") or fields.integer("vocab_size")
    inner = fields.optional_integer("mlp_hidden_size") or fields.integer("mlp_ratio") * width
    if width % heads or heads % kv_heads:
        raise CheckpointError(
            f"config.json: d_model {width}, n_heads {heads} and n_kv_heads {kv_heads} do not divide"
        )
    return DecoderShape(
        num_layers=fields.integer("n_layers"),
        width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        inner=inner,
        vocab_size=vocab_size,
        rope_theta=fields.number("rope_theta", 10000.0),
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        tied=bool(config.get("weight_tying", False)),
    )


def traits_from_hf(config: Mapping[str, Any], added_tokens: Mapping[str, int]) -> ModelTraits:
    """Declare the model; the end-of-turn id comes from the tokenizer where it has one."""
    shape, fields = shape_from_hf(config), Fields(config)
    mask = fields.optional_integer("mask_token_id")
    if mask is None:
        mask = fields.from_tokenizer("mask_token_id", added_tokens, ("<|mdm_mask|>", "<|mask|>"), 126336)
    return ModelTraits(
        family="llada",
        architecture=ARCHITECTURE,
        vocab_size=shape.vocab_size,
        mask_token_id=mask,
        eos_token_ids=fields.token_ids("eos_token_id"),
        eot_token_id=added_tokens.get(_EOT_TOKEN),
        context_length=fields.integer("max_sequence_length"),
        block_length=fields.optional_integer("block_length") or _BLOCK_LENGTH,
        visibility=Visibility.BIDIRECTIONAL,
        block_origin=BlockOrigin.PROMPT_END,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        default_algorithm="llada",
    )


def targets(shape: DecoderShape) -> dict[str, Target]:
    """Return every tensor of a checkpoint and where it goes."""
    width, heads = shape.width, (shape.width,)
    kv_rows = shape.num_kv_heads * shape.head_dim
    found = {
        "model.transformer.wte.weight": Target("embedding", (shape.vocab_size, width)),
        "model.transformer.ln_f.weight": Target("norm.weight", (width,)),
    }
    if not shape.tied:
        found["model.transformer.ff_out.weight"] = Target("output.weight", (shape.vocab_size, width))
    for index in range(shape.num_layers):
        theirs, ours = f"model.transformer.blocks.{index}.", f"layers.{index}."
        qkv = [("q_proj", width), ("k_proj", kv_rows), ("v_proj", kv_rows)]
        qkv_parts = [(f"{theirs}{name}.weight", rows) for name, rows in qkv]
        found |= stacked(f"{ours}attention.qkv.weight", qkv_parts, heads)
        gate_up = [(f"{theirs}{name}.weight", shape.inner) for name in ("ff_proj", "up_proj")]
        found |= stacked(f"{ours}mlp.gate_up.weight", gate_up, heads)
        found[f"{theirs}attn_out.weight"] = Target(f"{ours}attention.out.weight", (width, width))
        found[f"{theirs}ff_out.weight"] = Target(f"{ours}mlp.down.weight", (width, shape.inner))
        found[f"{theirs}attn_norm.weight"] = Target(f"{ours}attention_norm.weight", heads)
        found[f"{theirs}ff_norm.weight"] = Target(f"{ours}mlp_norm.weight", heads)
    return found


def build(shape: DecoderShape) -> Decoder:
    """Make the module; on the meta device it takes no memory."""
    return Decoder(shape)
