"""Own the export of a trained state as an ordinary Hugging Face folder, and its check."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.model import TinyModel
from recipes.plan import Plan
from recipes.reference_forward import reference_logits
from recipes.tokenizer import END_ID, MASK_ID, MODEL_MAX_LENGTH, PAD_ID, write_tokenizer_config
from recipes.train import State

SDAR_NAMES = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "ff_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
LLADA_NAMES = {
    "embedding": "model.transformer.wte",
    "final_norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "attn_norm": "attn_norm",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "attn_out",
    "ff_norm": "ff_norm",
    "gate_proj": "ff_proj",
    "up_proj": "up_proj",
    "down_proj": "ff_out",
}
DEFAULT_NEW_TOKENS = {"sdar": 128, "llada": 64, "llada-fast": 64}
# Both forwards run in float32 on the same rounded weights; only the order of sums differs.
LOGIT_TOLERANCE = 1e-3


def published_name(name: str, plan: Plan) -> str:
    """Translate a training-time parameter name to the architecture's published one."""
    names, layer = (
        (SDAR_NAMES, "model.layers") if plan.is_block_causal else (LLADA_NAMES, "model.transformer.blocks")
    )
    if inner := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.weight", name):
        return f"{layer}.{inner[1]}.{names[inner[2]]}.weight"
    return f"{names[name.removesuffix('.weight')]}.weight"


def export(state: State, plan: Plan, folder: Path | None = None) -> None:
    """Write the averaged weights in bf16 with configuration and tokenizer, then check the folder."""
    folder = folder or plan.zoo_folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        published_name(name, plan): weight.to(torch.bfloat16).contiguous()
        for name, weight in state.average.items()
    }
    config = sdar_config(plan) if plan.is_block_causal else llada_config(plan)
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.rename(folder / "model.safetensors")
    _write_json(folder / "config.json", config)
    generation = {
        "eos_token_id": END_ID,
        "max_new_tokens": DEFAULT_NEW_TOKENS[plan.name],
        "pad_token_id": PAD_ID,
    }
    if not (folder / "generation_config.json").exists():
        _write_json(folder / "generation_config.json", generation)
    shutil.copyfile(plan.tokenizer_path, folder / "tokenizer.json")
    write_tokenizer_config(folder / "tokenizer_config.json")
    difference = check_folder(folder, plan)
    print(
        f"exported {folder} at {state.tokens / 1e6:.1f}M tokens; logits differ by {difference:.1e}",
        flush=True,
    )


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def sdar_config(plan: Plan) -> dict:
    """Return config.json with the fields of published SDAR checkpoints."""
    return {
        "architectures": ["SDARForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": plan.block_length,
        "bos_token_id": None,
        "eos_token_id": END_ID,
        "fuse_cross_entropy": False,
        "head_dim": plan.head_dim,
        "hidden_act": "silu",
        "hidden_size": plan.width,
        "initializer_range": 0.02,
        "intermediate_size": plan.ff_width,
        "mask_token_id": MASK_ID,
        "max_position_embeddings": MODEL_MAX_LENGTH,
        "max_window_layers": plan.num_layers,
        "model_type": "sdar",
        "num_attention_heads": plan.num_heads,
        "num_hidden_layers": plan.num_layers,
        "num_key_value_heads": plan.num_heads,
        "pad_token_id": PAD_ID,
        "rms_norm_eps": plan.rms_eps,
        "rope_scaling": None,
        "rope_theta": plan.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": plan.vocab_size,
    }


def llada_config(plan: Plan) -> dict:
    """Return config.json with the fields of published LLaDA checkpoints."""
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": plan.width,
        "embedding_dropout": 0.0,
        "embedding_size": plan.vocab_size,
        "eos_token_id": END_ID,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": MASK_ID,
        "max_sequence_length": MODEL_MAX_LENGTH,
        "mlp_hidden_size": plan.ff_width,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": plan.num_heads,
        "n_kv_heads": plan.num_heads,
        "n_layers": plan.num_layers,
        "pad_token_id": PAD_ID,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": plan.rms_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": plan.rope_theta,
        "scale_logits": False,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "vocab_size": plan.vocab_size,
        "weight_tying": False,
    }


def load_exported(folder: Path, plan: Plan) -> TinyModel:
    """Load an exported folder back into the training-time model, in bf16."""
    tensors, model = load_file(folder / "model.safetensors"), TinyModel(plan)
    model.load_state_dict({name: tensors[published_name(name, plan)] for name, _ in model.named_parameters()})
    return model.to(torch.bfloat16).eval()


@torch.no_grad()
def check_folder(folder: Path, plan: Plan) -> float:
    """Return the largest difference of logits between the training-time model and the reference forward.

    Raises:
        ValueError: the logits differ by more than LOGIT_TOLERANCE.
    """
    config, tensors = (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "model.safetensors"),
    )
    generator = torch.Generator().manual_seed(0)
    token_ids: Tensor = torch.randint(plan.vocab_size, (2, 70), generator=generator)
    positions = torch.arange(70).expand(2, 70)
    blocks = positions // plan.block_length if plan.is_block_causal else torch.zeros_like(positions)
    model = load_exported(folder, plan).float()
    trained = model.head(model.hidden(token_ids, positions, torch.zeros_like(positions), blocks))
    exported = reference_logits(config, {name: tensor.float() for name, tensor in tensors.items()}, token_ids)
    difference = float((trained - exported).abs().max())
    if difference > LOGIT_TOLERANCE:
        raise ValueError(f"{folder}: logits differ by {difference:.2e}, more than {LOGIT_TOLERANCE}")
    return difference
