"""Dream (`DreamModel`): a bidirectional Qwen2, whose hidden state at i predicts the token at i + 1.

Source: HKUNLP/Dream (arXiv:2508.15487). Checkpoint names are those of the published 7B models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.core.traits import BlockOrigin, ModelTraits, Visibility
from sfumato.models import qwen_names
from sfumato.models.checkpoint_names import Target
from sfumato.models.config_fields import Fields
from sfumato.models.decoder import Decoder, DecoderShape

ARCHITECTURE = "DreamModel"

_FIXED = {"hidden_act": "silu", "use_sliding_window": False, "rope_scaling": None, "use_mrope": False}
_MASK_TOKENS = ("<|mask|>", "<|MASK|>")
_KNOWN_MASK_ID = 151666
# Only block-wise algorithms ask; no field of config.json says so.
_BLOCK_LENGTH = 32
_EOT_TOKEN = "<|im_end|>"


def shape_from_hf(config: Mapping[str, Any]) -> DecoderShape:
    """Translate config.json; raises CheckpointError naming a missing or unsupported field."""
    return qwen_names.read_shape(config, _FIXED, theta=None, qkv_bias=True)


def traits_from_hf(config: Mapping[str, Any], added_tokens: Mapping[str, int]) -> ModelTraits:
    """Declare the model; chat turns end with a token that only the tokenizer names."""
    shape, fields = shape_from_hf(config), Fields(config)
    mask = fields.optional_integer("mask_token_id")
    if mask is None:
        mask = fields.from_tokenizer("mask_token_id", added_tokens, _MASK_TOKENS, _KNOWN_MASK_ID)
    return ModelTraits(
        family="dream",
        architecture=ARCHITECTURE,
        vocab_size=shape.vocab_size,
        mask_token_id=mask,
        eos_token_ids=fields.token_ids("eos_token_id"),
        eot_token_id=added_tokens.get(_EOT_TOKEN),
        context_length=fields.integer("max_position_embeddings"),
        block_length=fields.optional_integer("block_length") or _BLOCK_LENGTH,
        visibility=Visibility.BIDIRECTIONAL,
        block_origin=BlockOrigin.PROMPT_END,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        default_algorithm="dream",
        shifts_logits=True,
    )


def targets(shape: DecoderShape) -> dict[str, Target]:
    """Return every tensor of a checkpoint and where it goes."""
    return qwen_names.targets(shape)


def build(shape: DecoderShape) -> Decoder:
    """Make the module; on the meta device it takes no memory."""
    return Decoder(shape)
