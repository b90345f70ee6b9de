"""Fast-dLLM v2 (`Fast_dLLM_QwenForCausalLM`): a Qwen2 with block-causal attention and shifted logits.

Source: Efficient-Large-Model/Fast_dLLM_v2 (arXiv:2509.26328). Blocks are counted from position 0, and the
state at a block's last position predicts the first token of the next block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.core.traits import BlockOrigin, ModelTraits, Visibility
from sfumato.models import qwen_names
from sfumato.models.checkpoint_names import Target
from sfumato.models.config_fields import Fields
from sfumato.models.decoder import Decoder, DecoderShape

ARCHITECTURE = "Fast_dLLM_QwenForCausalLM"

_FIXED = {"hidden_act": "silu", "use_sliding_window": False, "rope_scaling": None}
# The mask is a default of the published class, the block length a field that later files have.
_KNOWN_MASK_ID = 151665
_KNOWN_BLOCK_LENGTH = 32
_EOT_TOKEN = "<|im_end|>"


def shape_from_hf(config: Mapping[str, Any]) -> DecoderShape:
    """Translate config.json; raises CheckpointError naming a missing or unsupported field."""
    return qwen_names.read_shape(config, _FIXED, theta=10000.0, qkv_bias=True)


def traits_from_hf(config: Mapping[str, Any], added_tokens: Mapping[str, int]) -> ModelTraits:
    """Declare the model; mask id and block length fall back to the family's values."""
    shape, fields = shape_from_hf(config), Fields(config)
    mask = fields.optional_integer("mask_token_id")
    if mask is None:
        mask = fields.from_tokenizer("mask_token_id", added_tokens, ("|<MASK>|", "<|mask|>"), _KNOWN_MASK_ID)
    block = fields.optional_integer("bd_size") or fields.optional_integer("block_size")
    return ModelTraits(
        family="fast_dllm_v2",
        architecture=ARCHITECTURE,
        vocab_size=shape.vocab_size,
        mask_token_id=mask,
        eos_token_ids=fields.token_ids("eos_token_id"),
        eot_token_id=added_tokens.get(_EOT_TOKEN),
        context_length=fields.integer("max_position_embeddings"),
        block_length=block or _KNOWN_BLOCK_LENGTH,
        visibility=Visibility.BLOCK_CAUSAL,
        block_origin=BlockOrigin.START,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        default_algorithm="fast_dllm_v2",
        shifts_logits=True,
    )


def targets(shape: DecoderShape) -> dict[str, Target]:
    """Return every tensor of a checkpoint and where it goes."""
    return qwen_names.targets(shape)


def build(shape: DecoderShape) -> Decoder:
    """Make the module; on the meta device it takes no memory."""
    return Decoder(shape)
