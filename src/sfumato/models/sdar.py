"""SDAR (`SDARForCausalLM`): a Qwen3-like decoder with block-causal attention, blocks counted from position 0.

Source: JetAstra/SDAR (arXiv:2510.06303). Checkpoint names are those of the published dense models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.core.traits import BlockOrigin, ModelTraits, Visibility
from sfumato.models import qwen_names
from sfumato.models.checkpoint_names import Target
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
    has_bias = bool(config.get("attention_bias", False))
    return qwen_names.read_shape(
        config, _FIXED, theta=10000.0, qk_norm=True, qkv_bias=has_bias, out_bias=has_bias, wide_norm=True
    )


def traits_from_hf(config: Mapping[str, Any], added_tokens: Mapping[str, int]) -> ModelTraits:
    """Declare the model; mask id and block length fall back to the tokenizer's and the family's values."""
    return declare(ARCHITECTURE, shape_from_hf(config), config, added_tokens)


def declare(
    architecture: str, shape: DecoderShape, config: Mapping[str, Any], added_tokens: Mapping[str, int]
) -> ModelTraits:
    """Return the traits that the dense and the sparse models share."""
    fields = Fields(config)
    mask = fields.optional_integer("mask_token_id")
    if mask is None:
        mask = fields.from_tokenizer("mask_token_id", added_tokens, (_MASK_TOKEN, "<|mask|>"), _KNOWN_MASK_ID)
    return ModelTraits(
        family="sdar",
        architecture=architecture,
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
    return qwen_names.targets(shape)


def build(shape: DecoderShape) -> Decoder:
    """Make the module; on the meta device it takes no memory."""
    return Decoder(shape)
