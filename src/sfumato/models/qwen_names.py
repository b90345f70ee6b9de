"""Field and tensor names of Qwen-like checkpoints, which most families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.models.checkpoint_names import Target, experts, gated_mlp, stacked
from sfumato.models.config_fields import Fields
from sfumato.models.decoder import DecoderShape


def read_shape(
    config: Mapping[str, Any], fixed: Mapping[str, object], *, theta: float | None, **differences: Any
) -> DecoderShape:
    """Translate config.json; raises CheckpointError naming a missing or unsupported field.

    fixed: values of the one variant that is known. theta: where the file may leave it out. differences: what
    a family has that is not read the same way.
    """
    fields = Fields(config)
    for name, value in fixed.items():
        fields.expect(name, value)
    heads, kv_heads, head_dim = fields.head_layout()
    shape: dict[str, Any] = {
        "num_layers": fields.integer("num_hidden_layers"),
        "width": fields.integer("hidden_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": fields.integer("vocab_size"),
        "rope_theta": fields.rotary_theta(theta),
        "tied": bool(config.get("tie_word_embeddings", False)),
    }
    if "inner" not in differences:
        shape["inner"] = fields.integer("intermediate_size")
    if "norm_eps" not in differences:
        shape["norm_eps"] = fields.number("rms_norm_eps", 1e-6)
    return DecoderShape(**shape, **differences)


def targets(shape: DecoderShape) -> dict[str, Target]:
    """Return every tensor of a checkpoint and where it goes."""
    width = shape.width
    found = {
        "model.embed_tokens.weight": Target("embedding", (shape.vocab_size, width)),
        "model.norm.weight": Target("norm.weight", (width,)),
    }
    if not shape.tied:
        found["lm_head.weight"] = Target("output.weight", (shape.vocab_size, width))
    for index in range(shape.num_layers):
        theirs, ours = f"model.layers.{index}.", f"layers.{index}."
        found |= _attention(shape, f"{theirs}self_attn.", f"{ours}attention.")
        found |= _mlp(shape, index, f"{theirs}mlp", f"{ours}mlp")
        found[f"{theirs}input_layernorm.weight"] = Target(f"{ours}attention_norm.weight", (width,))
        found[f"{theirs}post_attention_layernorm.weight"] = Target(f"{ours}mlp_norm.weight", (width,))
    return found


def _attention(shape: DecoderShape, theirs: str, ours: str) -> dict[str, Target]:
    query_rows, kv_rows = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    qkv = [("q_proj", query_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)]
    weights = [(f"{theirs}{name}.weight", rows) for name, rows in qkv]
    found = stacked(f"{ours}qkv.weight", weights, (shape.width,))
    found[f"{theirs}o_proj.weight"] = Target(f"{ours}out.weight", (shape.width, query_rows))
    if shape.qkv_bias:
        found |= stacked(f"{ours}qkv.bias", [(f"{theirs}{name}.bias", rows) for name, rows in qkv], ())
    if shape.out_bias:
        found[f"{theirs}o_proj.bias"] = Target(f"{ours}out.bias", (shape.width,))
    if shape.qk_norm:
        found[f"{theirs}q_norm.weight"] = Target(f"{ours}query_norm.weight", (shape.head_dim,))
        found[f"{theirs}k_norm.weight"] = Target(f"{ours}key_norm.weight", (shape.head_dim,))
    return found


def _mlp(shape: DecoderShape, index: int, theirs: str, ours: str) -> dict[str, Target]:
    sparse = shape.sparse
    if sparse is None or index not in sparse.layers:
        return gated_mlp(theirs, ours, width=shape.width, inner=shape.inner)
    router = {
        f"{theirs}.gate.weight": Target(f"{ours}.router.weight", (sparse.num_experts, shape.width)),
    }
    return router | experts(
        f"{theirs}.experts",
        f"{ours}.experts",
        num_experts=sparse.num_experts,
        width=shape.width,
        inner=sparse.inner,
    )
