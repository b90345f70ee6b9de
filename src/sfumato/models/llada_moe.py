"""LLaDA-MoE (`LLaDAMoEModelLM`): a bidirectional decoder with experts in every layer.

Source: inclusionAI/LLaDA-MoE-7B-A1B (arXiv:2509.24389). Queries and keys are normed per head; the router
takes the most probable experts with their plain probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.core.traits import BlockOrigin, ModelTraits, Visibility
from sfumato.models import qwen_names
from sfumato.models.checkpoint_names import Target
from sfumato.models.config_fields import Fields
from sfumato.models.decoder import Decoder, DecoderShape, SparseShape
from sfumato.models.routing import SoftmaxRouting

ARCHITECTURE = "LLaDAMoEModelLM"

# Values of the one variant that was published; another value means another forward pass.
_FIXED = {
    "hidden_act": "silu",
    "clip_qkv": None,
    "shared_expert_intermediate_size": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "router_num_group": None,
    "router_topk_group": None,
    "routed_scaling_factor": 1,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "qk_layernorm": True,
}
# Neither stands in the published file.
_KNOWN_MASK_ID = 156895
_BLOCK_LENGTH = 32
_EOT_TOKEN = "<|role_end|>"


def shape_from_hf(config: Mapping[str, Any]) -> DecoderShape:
    """Translate config.json; raises CheckpointError naming a missing or unsupported field."""
    fields = Fields(config)
    num_layers = fields.integer("num_hidden_layers")
    num_experts, num_chosen = fields.integer("num_experts"), fields.integer("num_experts_per_tok")
    if num_chosen > num_experts:
        raise fields.error("num_experts_per_tok", f"there are {num_experts} experts")
    is_sparse = config.get("moe_layer_freq") or [1] * num_layers
    if not isinstance(is_sparse, list) or len(is_sparse) != num_layers:
        raise fields.error("moe_layer_freq", f"expected {num_layers} flags")
    has_bias = bool(config.get("attention_bias", False))
    return qwen_names.read_shape(
        config,
        _FIXED,
        theta=50000.0,
        inner=fields.optional_integer("dense_intermediate_size") or 0,
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        qk_norm=True,
        qkv_bias=has_bias,
        out_bias=has_bias,
        sparse=SparseShape(
            layers=frozenset(index for index, flag in enumerate(is_sparse) if flag),
            num_experts=num_experts,
            num_chosen=num_chosen,
            inner=fields.integer("expert_intermediate_size"),
            routing=SoftmaxRouting(is_normalised=bool(config.get("norm_topk_prob"))),
        ),
    )


def traits_from_hf(config: Mapping[str, Any], added_tokens: Mapping[str, int]) -> ModelTraits:
    """Declare the model; its mask is in the tokenizer, or the published number."""
    shape, fields = shape_from_hf(config), Fields(config)
    mask = fields.optional_integer("mask_token_id")
    if mask is None or mask in fields.token_ids("eos_token_id"):
        # The published class has the end token's id as its default mask: it is never the mask.
        mask = fields.from_tokenizer("mask_token_id", added_tokens, ("<|mask|>",), _KNOWN_MASK_ID)
    return ModelTraits(
        family="llada_moe",
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
        default_algorithm="llada",
    )


def targets(shape: DecoderShape) -> dict[str, Target]:
    """Return every tensor of a checkpoint and where it goes."""
    return qwen_names.targets(shape)


def build(shape: DecoderShape) -> Decoder:
    """Make the module; on the meta device it takes no memory."""
    return Decoder(shape)
