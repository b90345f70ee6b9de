"""SDAR with experts (`SDARMoeForCausalLM`): SDAR whose MLPs are Qwen3-MoE's.

Source: JetAstra/SDAR (arXiv:2510.06303) holds no code of it; SGLang's describes Qwen3-MoE routing without a
shared expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfumato.core.traits import ModelTraits
from sfumato.models import qwen_names, sdar
from sfumato.models.checkpoint_names import Target
from sfumato.models.config_fields import Fields
from sfumato.models.decoder import Decoder, DecoderShape, SparseShape
from sfumato.models.routing import SoftmaxRouting

ARCHITECTURE = "SDARMoeForCausalLM"


def shape_from_hf(config: Mapping[str, Any]) -> DecoderShape:
    """Translate config.json; raises CheckpointError naming a missing or unsupported field."""
    fields, dense = Fields(config), sdar.shape_from_hf(config)
    num_experts, num_chosen = fields.integer("num_experts"), fields.integer("num_experts_per_tok")
    if num_chosen > num_experts:
        raise fields.error("num_experts_per_tok", f"there are {num_experts} experts")
    # Every layer has experts, unless one of two fields says otherwise.
    step = fields.integer("decoder_sparse_step") if config.get("decoder_sparse_step") is not None else 1
    dense_layers = fields.token_ids("mlp_only_layers")
    return replace(
        dense,
        sparse=SparseShape(
            layers=frozenset(
                index
                for index in range(dense.num_layers)
                if index not in dense_layers and (index + 1) % step == 0
            ),
            num_experts=num_experts,
            num_chosen=num_chosen,
            inner=fields.integer("moe_intermediate_size"),
            routing=SoftmaxRouting(is_normalised=fields.boolean("norm_topk_prob")),
        ),
    )


def traits_from_hf(config: Mapping[str, Any], added_tokens: Mapping[str, int]) -> ModelTraits:
    """Declare the model as the dense ones are."""
    return sdar.declare(ARCHITECTURE, shape_from_hf(config), config, added_tokens)


def targets(shape: DecoderShape) -> dict[str, Target]:
    """Return every tensor of a checkpoint and where it goes."""
    return qwen_names.targets(shape)


def build(shape: DecoderShape) -> Decoder:
    """Make the module; on the meta device it takes no memory."""
    return Decoder(shape)
