"""LLaDA2 (`LLaDA2MoeModelLM`): experts behind a grouped sigmoid router, block-causal from position 0.

Source: inclusionAI/LLaDA2.X (arXiv:2512.15745). Checkpoint names are those of the published models; mini,
flash, CAP and 2.1 differ in values alone. Block routing (`expert_capacity`) is SGLang 0.5.23's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.core.traits import BlockOrigin, ModelTraits, Visibility
from sfumato.errors import CheckpointError
from sfumato.models.checkpoint_names import Target, experts, gated_mlp
from sfumato.models.config_fields import Fields
from sfumato.models.decoder import Decoder, DecoderShape, SparseShape
from sfumato.models.routing import BlockCapacity, Groups, Pool, SigmoidRouting

ARCHITECTURE = "LLaDA2MoeModelLM"

_FIXED = {
    "hidden_act": "silu",
    "use_rmsnorm": True,
    "rope_scaling": None,
    "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
}
# The published files name neither mask nor end nor block length.
_MASK_TOKEN = "<|mask|>"
_KNOWN_MASK_ID = 156895
_KNOWN_EOS_ID = 156892
_KNOWN_BLOCK_LENGTH = 32


def shape_from_hf(config: Mapping[str, Any]) -> DecoderShape:
    """Translate config.json; raises CheckpointError naming a missing or unsupported field."""
    fields = Fields(config)
    for name, value in _FIXED.items():
        fields.expect(name, value)
    heads, kv_heads, head_dim = fields.head_layout()
    num_layers = fields.integer("num_hidden_layers")
    return DecoderShape(
        num_layers=num_layers,
        width=fields.integer("hidden_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        inner=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        rope_theta=fields.rotary_theta(),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rotary_dim=_rotary_dim(fields, head_dim),
        qk_norm=True,
        qkv_bias=bool(config.get("use_qkv_bias", False)),
        out_bias=bool(config.get("use_bias", False)),
        tied=bool(config.get("tie_word_embeddings", False)),
        sparse=_sparse_shape(fields, num_layers),
    )


def _rotary_dim(fields: Fields, head_dim: int) -> int:
    """Return how many dimensions of a head turn; files say so in one of three ways, or in several."""
    found = {}
    for name, source in (("", fields), ("rope_parameters.", fields.rotary_parameters())):
        if source.config.get("partial_rotary_factor") is not None:
            found[f"{name}partial_rotary_factor"] = int(head_dim * source.number("partial_rotary_factor"))
    if (width := fields.optional_integer("rotary_dim")) is not None:
        found["rotary_dim"] = width
    if not found:
        fields.require("partial_rotary_factor")
    widths = set(found.values())
    width = widths.pop()
    if widths or not 0 < width <= head_dim or width % 2:
        said = ", ".join(f"{name}: {value}" for name, value in found.items())
        raise CheckpointError(
            f"config.json: {said} of head_dim {head_dim} dimensions turn; expected one even number up to that"
        )
    return width


def _sparse_shape(fields: Fields, num_layers: int) -> SparseShape:
    num_experts, num_chosen = fields.integer("num_experts"), fields.integer("num_experts_per_tok")
    inner = fields.integer("moe_intermediate_size")
    pool, num_candidates = _pool(fields, num_experts)
    if num_chosen > num_candidates:
        raise fields.error("num_experts_per_tok", f"a token chooses from {num_candidates} experts")
    return SparseShape(
        layers=frozenset(range(fields.optional_integer("first_k_dense_replace") or 0, num_layers)),
        num_experts=num_experts,
        num_chosen=num_chosen,
        inner=inner,
        routing=SigmoidRouting(scale=fields.number("routed_scaling_factor"), pool=pool),
        shared_inner=(fields.optional_integer("num_shared_experts") or 0) * inner,
    )


def _pool(fields: Fields, num_experts: int) -> tuple[Pool, int]:
    """Return the experts that a token may choose from, and how many they are."""
    if fields.config.get("expert_capacity") is not None:
        capacity = fields.integer("expert_capacity")
        if capacity > num_experts:
            raise fields.error("expert_capacity", f"there are {num_experts} experts")
        return BlockCapacity(fields.integer("block_size"), capacity), capacity
    groups, kept = fields.integer("n_group"), fields.integer("topk_group")
    if num_experts % groups:
        raise fields.error("n_group", f"{num_experts} experts do not divide into that many groups")
    if kept > groups:
        raise fields.error("topk_group", f"there are {groups} groups")
    return Groups(groups, kept), num_experts // groups * kept


def traits_from_hf(config: Mapping[str, Any], added_tokens: Mapping[str, int]) -> ModelTraits:
    """Declare the model; what the file lacks is the tokenizer's or the family's."""
    shape, fields = shape_from_hf(config), Fields(config)
    mask = fields.optional_integer("mask_token_id")
    if mask is None:
        mask = fields.from_tokenizer("mask_token_id", added_tokens, (_MASK_TOKEN,), _KNOWN_MASK_ID)
    ends = fields.token_ids("eos_token_id")
    if not ends and shape.vocab_size > _KNOWN_EOS_ID:
        ends = (_KNOWN_EOS_ID,)
    block_length = fields.optional_integer("block_length") or fields.optional_integer("block_size")
    return ModelTraits(
        family="llada2",
        architecture=ARCHITECTURE,
        vocab_size=shape.vocab_size,
        mask_token_id=mask,
        eos_token_ids=ends,
        eot_token_id=None,
        context_length=fields.integer("max_position_embeddings"),
        block_length=block_length or _KNOWN_BLOCK_LENGTH,
        visibility=Visibility.BLOCK_CAUSAL,
        block_origin=BlockOrigin.START,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        default_algorithm="low_confidence",
        fixed_block_length=shape.sparse is not None and shape.sparse.routing.block_length is not None,
    )


def targets(shape: DecoderShape) -> dict[str, Target]:
    """Return every tensor of a checkpoint and where it goes."""
    width = shape.width
    found = {
        "model.word_embeddings.weight": Target("embedding", (shape.vocab_size, width)),
        "model.norm.weight": Target("norm.weight", (width,)),
    }
    if not shape.tied:
        found["lm_head.weight"] = Target("output.weight", (shape.vocab_size, width))
    for index in range(shape.num_layers):
        theirs, ours = f"model.layers.{index}.", f"layers.{index}."
        found |= _attention_targets(shape, f"{theirs}attention.", f"{ours}attention.")
        found |= _mlp_targets(shape, index, f"{theirs}mlp", f"{ours}mlp")
        found[f"{theirs}input_layernorm.weight"] = Target(f"{ours}attention_norm.weight", (width,))
        found[f"{theirs}post_attention_layernorm.weight"] = Target(f"{ours}mlp_norm.weight", (width,))
    return found


def _attention_targets(shape: DecoderShape, theirs: str, ours: str) -> dict[str, Target]:
    query_rows = shape.num_heads * shape.head_dim
    rows = query_rows + 2 * shape.num_kv_heads * shape.head_dim
    found = {
        f"{theirs}query_key_value.weight": Target(f"{ours}qkv.weight", (rows, shape.width)),
        f"{theirs}dense.weight": Target(f"{ours}out.weight", (shape.width, query_rows)),
        f"{theirs}query_layernorm.weight": Target(f"{ours}query_norm.weight", (shape.head_dim,)),
        f"{theirs}key_layernorm.weight": Target(f"{ours}key_norm.weight", (shape.head_dim,)),
    }
    if shape.qkv_bias:
        found[f"{theirs}query_key_value.bias"] = Target(f"{ours}qkv.bias", (rows,))
    if shape.out_bias:
        found[f"{theirs}dense.bias"] = Target(f"{ours}out.bias", (shape.width,))
    return found


def _mlp_targets(shape: DecoderShape, index: int, theirs: str, ours: str) -> dict[str, Target]:
    sparse, width = shape.sparse, shape.width
    if sparse is None or index not in sparse.layers:
        return gated_mlp(theirs, ours, width=width, inner=shape.inner)
    count = sparse.num_experts
    found = {
        f"{theirs}.gate.weight": Target(f"{ours}.router.weight", (count, width), is_float32=True),
        f"{theirs}.gate.expert_bias": Target(f"{ours}.router.bias", (count,), is_float32=True),
    }
    found |= experts(
        f"{theirs}.experts", f"{ours}.experts", num_experts=count, width=width, inner=sparse.inner
    )
    if sparse.shared_inner:
        shared = f"{theirs}.shared_experts"
        found |= gated_mlp(shared, f"{ours}.shared", width=width, inner=sparse.shared_inner)
    return found


def build(shape: DecoderShape) -> Decoder:
    """Make the module; on the meta device it takes no memory."""
    return Decoder(shape)
