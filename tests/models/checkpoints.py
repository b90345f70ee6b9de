"""Checkpoints that tests write: a small configuration of each family, seeded random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.models.batch import Batch, KVStore, Segment, group_segments
from sfumato.models.folder import read_folder
from sfumato.models.language_model import LanguageModel
from sfumato.models.weights import build_on_meta, load_model

LLADA2: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"], "vocab_size": 90, "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "rope_theta": 10000.0, "eos_token_id": 88,
    "mask_token_id": 89, "num_experts": 12, "num_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 3,
    "topk_group": 2, "routed_scaling_factor": 2.5, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "partial_rotary_factor": 0.5, "use_qkv_bias": True, "use_bias": True, "block_size": 8,
}  # fmt: skip
SDAR_MOE: dict[str, Any] = {
    "architectures": ["SDARMoeForCausalLM"], "vocab_size": 90, "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "rope_theta": 10000.0, "eos_token_id": 88,
    "mask_token_id": 89, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [1], "block_size": 4,
}  # fmt: skip
DREAM: dict[str, Any] = {
    "architectures": ["DreamModel"], "vocab_size": 90, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128, "rope_theta": 10000.0, "eos_token_id": 88, "mask_token_id": 89,
    "tie_word_embeddings": False, "use_sliding_window": False, "rope_scaling": None, "use_mrope": False,
}  # fmt: skip
LLADA_MOE: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"], "vocab_size": 90, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
    "max_position_embeddings": 128, "dense_intermediate_size": 96, "expert_intermediate_size": 24,
    "num_experts": 6, "num_experts_per_tok": 2, "moe_layer_freq": [1, 1], "qk_layernorm": True,
    "norm_topk_prob": None, "mask_token_id": 89, "eos_token_id": 88, "tie_word_embeddings": False,
}  # fmt: skip
FAST_DLLM_V2: dict[str, Any] = {
    "architectures": ["Fast_dLLM_QwenForCausalLM"], "vocab_size": 90, "hidden_size": 64, "bd_size": 8,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 128, "mask_token_id": 89,
    "eos_token_id": 88, "tie_word_embeddings": True, "use_sliding_window": False,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"], "canvas_length": 8, "eos_token_id": [1, 5],
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 90, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 6, "top_k_experts": 2,
        "moe_intermediate_size": 24, "rms_norm_eps": 1e-6, "max_position_embeddings": 128,
        "sliding_window": 5, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "per_layer_config": {"2": {"head_dim": 32, "num_key_value_heads": 1}},
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    },
}  # fmt: skip
EVERY = {
    "llada2": LLADA2,
    "sdar_moe": SDAR_MOE,
    "dream": DREAM,
    "llada_moe": LLADA_MOE,
    "fast_dllm_v2": FAST_DLLM_V2,
    "diffusion_gemma": GEMMA,
}


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Return a value for every tensor of a checkpoint: vectors near one, matrices near zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, target in build_on_meta(config)[1].items():
        noise = torch.randn(target.shape, generator=generator)
        is_factor = len(target.shape) == 1 and not name.endswith("bias")
        weights[name] = 1 + 0.2 * noise if is_factor else 0.2 * noise
    return weights


def write(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """Write a folder with one weight file."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
    return path


def write_shards(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """Write a folder whose tensors lie in two files, in turns."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: weights[name].contiguous() for name in members}, path / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def load(path: Path, dtype: torch.dtype = torch.float32, *, pack: bool = True) -> LanguageModel:
    """Load a folder's model as a user would."""
    return load_model(read_folder(str(path)), dtype=dtype, device="cpu", pack=pack)


def allocate(model: LanguageModel, num_slots: int) -> KVStore:
    """Return an empty store of a model."""
    return KVStore.allocate(
        shapes=model.shape.kv_shapes, num_slots=num_slots, dtype=model.dtype, device="cpu"
    )


def whole(model: LanguageModel, ids: Tensor, output_tokens: Tensor | None = None) -> Tensor:
    """Return the hidden states of a sequence that sees all of itself, from position 0."""
    slots = torch.arange(len(ids))
    groups = group_segments([Segment(0, len(ids), slots, None)], "cpu")
    batch = Batch(
        token_ids=ids,
        positions=slots,
        groups=groups,
        windowed=groups,
        store=allocate(model, len(ids)),
        write_slots=slots,
        write_tokens=slots,
        output_tokens=output_tokens,
    )
    with torch.inference_mode():
        return model.hidden(batch)
