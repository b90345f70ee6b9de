"""DiffusionGemma (`DiffusionGemmaForBlockDiffusion`), text only: causal encoder and canvas denoiser in one.

Source: transformers 5.23 `diffusion_gemma` for field and tensor names. Blocks are canvases, counted from the
end of the prompt; the context before them is cached token by token. What belongs to images is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.core.traits import BlockOrigin, ModelTraits, Visibility
from sfumato.models.checkpoint_names import Target, gated_mlp, stacked
from sfumato.models.config_fields import Fields
from sfumato.models.gemma_decoder import GemmaDecoder, GemmaLayerShape, GemmaShape

ARCHITECTURE = "DiffusionGemmaForBlockDiffusion"

_REQUIRED = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_experts",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "top_k_experts",
    "vocab_size",
)
_FIXED = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "tie_word_embeddings": True}
_SLIDING, _FULL = "sliding_attention", "full_attention"
# The class's default, which files do not repeat.
_SOFT_CAP = 30.0

# Checkpoint names of a layer's norms and scales, and ours.
_LAYER_VECTORS = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "attention_post_norm.weight",
    "pre_feedforward_layernorm.weight": "mlp_norm.weight",
    "post_feedforward_layernorm_1.weight": "mlp_post_norm.weight",
    "pre_feedforward_layernorm_2.weight": "experts_norm.weight",
    "post_feedforward_layernorm_2.weight": "experts_post_norm.weight",
    "post_feedforward_layernorm.weight": "post_norm.weight",
    "router.scale": "router.scale",
}


def shape_from_hf(config: Mapping[str, Any]) -> GemmaShape:
    """Translate config.json; raises CheckpointError naming all missing fields, or an unsupported one."""
    whole = Fields(config)
    whole.require("canvas_length", "text_config")
    whole.expect("tie_word_embeddings", True)
    text = whole.nested("text_config")
    text.require(*_REQUIRED)
    for name, value in _FIXED.items():
        text.expect(name, value)
    if text.config.get("use_bidirectional_attention") == "all":
        raise text.error("use_bidirectional_attention", "expected a context that is encoded causally")
    num_experts, num_chosen = text.integer("num_experts"), text.integer("top_k_experts")
    if num_chosen > num_experts:
        raise text.error("top_k_experts", f"there are {num_experts} experts")
    positions = text.nested("rope_parameters")
    sliding, full = positions.nested(_SLIDING), positions.nested(_FULL)
    sliding.expect("rope_type", "default")
    full.expect("rope_type", "proportional")
    return GemmaShape(
        layers=_layers(text),
        width=text.integer("hidden_size"),
        num_heads=text.integer("num_attention_heads"),
        inner=text.integer("intermediate_size"),
        num_experts=num_experts,
        num_chosen=num_chosen,
        expert_inner=text.integer("moe_intermediate_size"),
        vocab_size=text.integer("vocab_size"),
        window=text.integer("sliding_window"),
        sliding_theta=sliding.number("rope_theta"),
        full_theta=full.number("rope_theta"),
        turning=full.number("partial_rotary_factor"),
        norm_eps=text.number("rms_norm_eps"),
        soft_cap=text.number("final_logit_softcapping", _SOFT_CAP),
    )


def _layers(text: Fields) -> tuple[GemmaLayerShape, ...]:
    kinds = text.config["layer_types"]
    if not isinstance(kinds, list) or not set(kinds) <= {_SLIDING, _FULL} or kinds[-1] != _FULL:
        raise text.error(
            "layer_types", f"expected a list of {_SLIDING} and {_FULL} that ends with the latter"
        )
    if len(kinds) != text.integer("num_hidden_layers"):
        raise text.error("num_hidden_layers", f"layer_types has {len(kinds)} entries")
    layers = []
    for index, kind in enumerate(kinds):
        kv_heads, head_dim = _attention_sizes(text, index, kind)
        if text.integer("num_attention_heads") % kv_heads:
            raise text.error("num_attention_heads", f"layer {index} has {kv_heads} key-value heads")
        layers.append(GemmaLayerShape(windowed=kind == _SLIDING, num_kv_heads=kv_heads, head_dim=head_dim))
    return tuple(layers)


def _attention_sizes(text: Fields, index: int, kind: str) -> tuple[int, int]:
    """Return key-value heads and head width of a layer; full layers have their own, written in two ways."""
    kv_heads, head_dim = text.integer("num_key_value_heads"), text.integer("head_dim")
    if text.config.get("per_layer_config") is not None:
        layers = text.nested("per_layer_config")
        if layers.config.get(str(index)) is None:
            return kv_heads, head_dim
        own = layers.nested(str(index))
        known = {"head_dim", "num_key_value_heads"}
        if not own.config.keys() <= known:
            raise layers.error(str(index), f"only {' and '.join(sorted(known))} may differ between layers")
        return (
            own.optional_integer("num_key_value_heads") or kv_heads,
            own.optional_integer("head_dim") or head_dim,
        )
    if kind == _SLIDING:
        return kv_heads, head_dim
    return text.optional_integer("num_global_key_value_heads") or kv_heads, text.integer("global_head_dim")


def traits_from_hf(config: Mapping[str, Any], added_tokens: Mapping[str, int]) -> ModelTraits:
    """Declare the model; there is no mask token, a canvas starts with random tokens."""
    shape, whole = shape_from_hf(config), Fields(config)
    text = whole.nested("text_config")
    return ModelTraits(
        family="diffusion_gemma",
        architecture=ARCHITECTURE,
        vocab_size=shape.vocab_size,
        mask_token_id=-1,
        eos_token_ids=whole.token_ids("eos_token_id") or text.token_ids("eos_token_id"),
        eot_token_id=None,
        context_length=text.integer("max_position_embeddings"),
        block_length=whole.integer("canvas_length"),
        visibility=Visibility.BLOCK_CAUSAL,
        block_origin=BlockOrigin.PROMPT_END,
        num_layers=shape.num_layers,
        num_kv_heads=text.integer("num_key_value_heads"),
        head_dim=text.integer("head_dim"),
        default_algorithm="entropy_bound",
        fixed_block_length=True,
        kv_shapes=shape.kv_shapes,
        window=shape.window,
        context_granularity=1,
        has_mask_token=False,
        has_self_conditioning=True,
    )


def targets(shape: GemmaShape) -> dict[str, Target]:
    """Return every tensor of a checkpoint and where it goes; all but the layer scalars are the decoder's."""
    width = (shape.width,)
    conditioning = "model.decoder.self_conditioning"
    found = {
        "model.decoder.embed_tokens.weight": Target("embedding", (shape.vocab_size, shape.width)),
        "model.decoder.norm.weight": Target("norm.weight", width),
        f"{conditioning}.pre_norm.weight": Target("conditioning.norm.weight", width),
    }
    found |= gated_mlp(conditioning, "conditioning.mlp", width=shape.width, inner=shape.inner)
    for index in range(shape.num_layers):
        theirs, ours = f"model.decoder.layers.{index}.", f"layers.{index}."
        found |= {
            theirs + name: Target(ours + parameter, width) for name, parameter in _LAYER_VECTORS.items()
        }
        found |= _attention_targets(shape, index, f"{theirs}self_attn.", f"{ours}attention.")
        found |= gated_mlp(f"{theirs}mlp", f"{ours}mlp", width=shape.width, inner=shape.inner)
        found |= _expert_targets(shape, theirs, ours)
        found[f"{theirs}layer_scalar"] = Target(f"{ours}scalar", (1,))
        encoder = f"model.encoder.language_model.layers.{index}."
        found[f"{encoder}layer_scalar"] = Target(f"{ours}context_scalar", (1,))
    return found


def _attention_targets(shape: GemmaShape, index: int, theirs: str, ours: str) -> dict[str, Target]:
    layer = shape.layers[index]
    query_rows, kv_rows = shape.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    parts = [("q_proj", query_rows), ("k_proj", kv_rows)] + [("v_proj", kv_rows)] * layer.windowed
    return stacked(
        f"{ours}qkv.weight", [(f"{theirs}{name}.weight", rows) for name, rows in parts], (shape.width,)
    ) | {
        f"{theirs}o_proj.weight": Target(f"{ours}out.weight", (shape.width, query_rows)),
        f"{theirs}q_norm.weight": Target(f"{ours}query_norm.weight", (layer.head_dim,)),
        f"{theirs}k_norm.weight": Target(f"{ours}key_norm.weight", (layer.head_dim,)),
    }


def _expert_targets(shape: GemmaShape, theirs: str, ours: str) -> dict[str, Target]:
    count, width, inner = shape.num_experts, shape.width, shape.expert_inner
    return {
        f"{theirs}experts.gate_up_proj": Target(f"{ours}experts.gate_up", (count, 2 * inner, width)),
        f"{theirs}experts.down_proj": Target(f"{ours}experts.down", (count, width, inner)),
        f"{theirs}router.proj.weight": Target(f"{ours}router.weight", (count, width)),
        f"{theirs}router.per_expert_scale": Target(f"{ours}router.expert_scale", (count,)),
    }


def build(shape: GemmaShape) -> GemmaDecoder:
    """Make the module; on the meta device it takes no memory."""
    return GemmaDecoder(shape)
