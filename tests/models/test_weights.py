"""Checkpoints: real configurations on the meta device, every damage one clear error, shards and dtypes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.errors import CheckpointError, ConfigError
from sfumato.models.folder import Overrides, embedded_models, read_folder
from sfumato.models.weights import build_on_meta, count_parameters, load_model, resolve_dtype
from tests.goldens.logits import forward_rows

GOLDENS = Path(__file__).resolve().parent.parent / "data" / "goldens"
LLADA = GOLDENS / "llada" / "checkpoints" / "llada-tiny-mha"
SDAR = GOLDENS / "sdar" / "checkpoints" / "sdar-tiny"

# Fields of published files that decide names and sizes: LLaDA-8B-Instruct, Dream-7B, LLaDA2.0, SDAR-4B-Chat.
LLADA_8B: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"], "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32,
    "mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "max_sequence_length": 4096, "mask_token_id": 126336, "eos_token_id": 126081,
    "activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms", "weight_tying": False,
}  # fmt: skip
DREAM_7B: dict[str, Any] = {
    "architectures": ["DreamModel"], "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "mask_token_id": 151666, "eos_token_id": 151643,
    "hidden_act": "silu", "rope_scaling": None, "use_mrope": False, "use_sliding_window": False,
    "tie_word_embeddings": False, "max_window_layers": 28, "sliding_window": None,
}  # fmt: skip
LLADA2_MINI: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"], "hidden_size": 2048, "num_hidden_layers": 20, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 5120, "vocab_size": 157184,
    "first_k_dense_replace": 1, "hidden_act": "silu", "max_position_embeddings": 16384,
    "moe_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1,
    "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "score_function": "sigmoid", "router_dtype": "fp32", "moe_router_enable_expert_bias": True,
    "rope_theta": 600000, "rope_scaling": None, "rotary_dim": 64, "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6, "use_rmsnorm": True, "use_bias": False, "use_qkv_bias": False, "norm_head": False,
    "norm_softmax": False, "tie_word_embeddings": False, "use_sliding_window": False, "pad_token_id": 156892,
    "using_split_qkv_in_self_attention": False, "max_window_layers": 28,
}  # fmt: skip
LLADA2_FLASH = LLADA2_MINI | {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
}  # fmt: skip
# Images are tokens behind the words'; text needs no more than a wider vocabulary.
LLADA2_UNI = {
    name: value for name, value in LLADA2_MINI.items() if name not in ("rotary_dim", "norm_topk_prob")
} | {
    "vocab_size": 173568, "max_position_embeddings": 8192, "use_qk_norm": True, "image_token_offset": 157184,
    "rope_parameters": {"rope_type": "default", "rope_theta": 600000, "partial_rotary_factor": 0.5},
}  # fmt: skip
SDAR_4B: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"], "hidden_size": 2560, "num_hidden_layers": 36, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 9728, "vocab_size": 151936,
    "rope_theta": 1000000, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "eos_token_id": 151643,
    "attention_bias": False, "tie_word_embeddings": False, "hidden_act": "silu", "rope_scaling": None,
}  # fmt: skip

LLADA2_NAMES = (
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.gate.expert_bias",
    "model.layers.19.mlp.experts.255.down_proj.weight",
    "model.layers.19.mlp.shared_experts.gate_proj.weight",
    "model.layers.19.attention.query_key_value.weight",
)


@pytest.mark.parametrize(
    ("config", "billions", "names"),
    [
        (LLADA_8B, 8.0, ("model.transformer.blocks.31.up_proj.weight", "model.transformer.ff_out.weight")),
        (DREAM_7B, 7.6, ("model.layers.27.self_attn.v_proj.bias", "lm_head.weight")),
        (LLADA2_MINI, 16.3, LLADA2_NAMES),
        (LLADA2_FLASH, 102.9, LLADA2_NAMES),
        (LLADA2_UNI, 16.3, LLADA2_NAMES),
        (SDAR_4B, 4.4, ("model.layers.35.self_attn.q_norm.weight", "lm_head.weight")),
    ],
)
def test_real_configurations_build_without_memory(
    config: dict[str, Any], billions: float, names: Any
) -> None:
    model, targets = build_on_meta(config)
    assert round(count_parameters(targets) / 1e9, 1) == billions
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(targets)
    assert all(name in targets for name in names)
    assert all(parameter.is_meta for parameter in model.parameters())


def write_folder(path: Path, config: dict[str, Any], **files: Any) -> Path:
    """Write a folder without weights."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_missing_mask_and_block_come_from_the_family_the_tokenizer_or_the_operator(tmp_path: Path) -> None:
    traits = read_folder(str(write_folder(tmp_path / "a", SDAR_4B))).traits
    assert (traits.mask_token_id, traits.block_length) == (151669, 4)
    tokens = {"added_tokens": [{"content": "<|MASK|>", "id": 777}]}
    traits = read_folder(str(write_folder(tmp_path / "b", SDAR_4B, tokenizer=tokens))).traits
    assert traits.mask_token_id == 777
    given = Overrides(mask_token_id=5, block_length=16, context_length=1024)
    traits = read_folder(str(tmp_path / "b"), given).traits
    assert (traits.mask_token_id, traits.block_length, traits.context_length) == (5, 16, 1024)
    with pytest.raises(ConfigError, match="32768"):
        read_folder(str(tmp_path / "b"), Overrides(context_length=99999))
    small = SDAR_4B | {"vocab_size": 1000}
    with pytest.raises(CheckpointError, match=r"mask_token_id.*--mask-token-id"):
        read_folder(str(write_folder(tmp_path / "c", small)))


def test_generation_config_adds_end_tokens_and_defaults(tmp_path: Path) -> None:
    generation = {
        "eos_token_id": [7, 151643],
        "max_new_tokens": 99,
        "sfumato": {"algorithm": "sdar", "parameters": {"confidence_threshold": 0.7}},
    }
    traits = read_folder(str(write_folder(tmp_path, SDAR_4B, generation_config=generation))).traits
    assert traits.eos_token_ids == (151643, 7)
    assert traits.default_max_tokens == 99
    assert traits.default_parameters == {"confidence_threshold": 0.7}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    shutil.copytree(LLADA, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        path.chmod(0o644)
    return tmp_path / "copy"


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a folder's model."""
    return load_model(read_folder(str(path)), dtype=dtype, device="cpu")


def damage_missing(path: Path, weights: dict[str, torch.Tensor]) -> str:
    del weights["model.transformer.blocks.1.up_proj.weight"]
    return "model.transformer.blocks.1.up_proj.weight' is missing"


def damage_extra(path: Path, weights: dict[str, torch.Tensor]) -> str:
    weights["model.transformer.blocks.9.up_proj.weight"] = torch.zeros(2)
    return "model.transformer.blocks.9.up_proj.weight' is not part"


def damage_shape(path: Path, weights: dict[str, torch.Tensor]) -> str:
    weights["model.transformer.ln_f.weight"] = torch.zeros(3)
    return "model.transformer.ln_f.weight' has shape \\[3\\], expected \\[64\\]"


@pytest.mark.parametrize("damage", [damage_missing, damage_extra, damage_shape])
def test_wrong_tensors_are_named(copy: Path, damage: Any) -> None:
    weights = load_file(copy / "model.safetensors")
    message = damage(copy, weights)
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_a_truncated_file_is_named(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        load(copy)


def test_a_pickle_is_never_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "architectures"),
        ({"alibi": True}, "alibi"),
        ({"d_model": None}, "d_model"),
        ({"n_layers": "three"}, "n_layers"),
        ({"eos_token_id": 9999}, "eos_token_id 9999"),
        ({"block_type": "sequential"}, "block_type"),
    ],
)
def test_a_wrong_configuration_is_named(copy: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_damaged_json_and_unknown_models_are_named(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_folder(str(copy))
    with pytest.raises(CheckpointError, match="no such folder"):
        read_folder("./nowhere")


def test_shards_give_the_same_model(copy: Path) -> None:
    whole = load(copy)
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: weights[name] for name in members}, copy / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    ids = [torch.arange(9)]
    assert torch.equal(forward_rows(whole, ids), forward_rows(load(copy), ids))
    (copy / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        load(copy)


@pytest.mark.parametrize("path", [LLADA, SDAR])
def test_packed_and_plain_weights_agree(path: Path) -> None:
    folder = read_folder(str(path))
    ids = [torch.arange(11)]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
        packed = load_model(folder, dtype=dtype, device="cpu")
        plain = load_model(folder, dtype=dtype, device="cpu", pack=False)
        difference = (forward_rows(packed, ids).float() - forward_rows(plain, ids).float()).abs().max()
        assert float(difference) <= tolerance
        assert packed.dtype == dtype


def test_tied_heads_share_the_embedding(tmp_path: Path) -> None:
    shutil.copytree(SDAR, tmp_path / "tied")
    config_path = tmp_path / "tied" / "config.json"
    config_path.chmod(0o644)
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | {"tie_word_embeddings": True}))
    model = load_model(read_folder(str(tmp_path / "tied")), dtype=torch.float32, device="cpu", pack=False)
    assert model.output.weight.data_ptr() == model.embedding.data_ptr()


def test_dtypes() -> None:
    assert resolve_dtype("auto", {"torch_dtype": "bfloat16"}) is torch.bfloat16
    assert resolve_dtype("auto", {}) is torch.float32
    assert resolve_dtype("auto", {"dtype": "float16", "text_config": {"dtype": "bfloat16"}}) is torch.float16
    assert resolve_dtype("auto", {"text_config": {"dtype": "bfloat16"}}) is torch.bfloat16
    with pytest.raises(CheckpointError, match="int4"):
        resolve_dtype("int4", {})


def test_embedded_models_load_and_have_a_chat_template() -> None:
    from sfumato.text.tokenizer import Tokenizer

    assert embedded_models()[0] == "sfumato-tiny-sdar"
    for name in embedded_models():
        folder = read_folder(name)
        load_model(folder, dtype=torch.bfloat16, device="cpu")
        assert Tokenizer(folder.path).apply_chat_template([{"role": "user", "content": "Hello"}])
