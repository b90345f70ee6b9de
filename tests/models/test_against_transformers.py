"""Model classes against transformers' own: head layouts and biases, with the attention of diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.naive import whole_canvas_logits
from tests.models.checkpoints import DREAM, FAST_DLLM_V2, LLADA_MOE, SDAR_MOE, load, write

LENGTH = 22


def randomise(model: Any) -> None:
    """Give every parameter seeded random values, biases and norms too."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() == 1 else 0.15)
        parameter.data = noise + 1 if "norm" in name else noise


def theirs(model: Any, ids: Tensor, visible: Tensor) -> Tensor:
    """Return transformers' logits under a mask of visible keys."""
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids[None], attention_mask=mask, use_cache=False).logits[0]
    return logits


def ours(
    path: Path, config: dict[str, Any], weights: dict[str, Tensor], ids: Tensor, block: int | None
) -> Tensor:
    """Save a checkpoint, load it as a user would, and return its logits."""
    model = load(write(path, config, weights))
    with torch.inference_mode():
        return whole_canvas_logits(model, ids, block)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("block", [4, 8])
def test_sdar_is_qwen3_with_a_block_causal_mask(
    tmp_path: Path, bias: bool, kv_heads: int, block: int
) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "intermediate_size": 80,
        "vocab_size": 90,
        "rms_norm_eps": 1e-6,
        "attention_bias": bias,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    reference = Qwen3ForCausalLM(Qwen3Config(**shape, rope_theta=10000.0)).eval()
    randomise(reference)
    ids = torch.randint(0, 89, (LENGTH,), generator=torch.Generator().manual_seed(2))
    blocks = torch.arange(LENGTH) // block
    expected = theirs(reference, ids, blocks[None, :] <= blocks[:, None])
    config = shape | {
        "architectures": ["SDARForCausalLM"],
        "rope_theta": 10000.0,
        "block_size": block,
        "mask_token_id": 89,
        "eos_token_id": 88,
    }
    found = ours(tmp_path, config, dict(reference.state_dict()), ids, block)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def unstacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state in which every expert has tensors of its own, as checkpoints have them."""
    weights = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                stem = name.replace("gate_up_proj", str(expert))
                weights |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                weights[f"{name.replace('down_proj', str(expert))}.down_proj.weight"] = down
        else:
            weights[name] = tensor
    return weights


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("is_normalised", [None, True])
def test_llada_moe_is_qwen3_moe_that_sees_everything(
    tmp_path: Path, kv_heads: int, is_normalised: bool | None
) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = LLADA_MOE | {"num_key_value_heads": kv_heads, "norm_topk_prob": is_normalised}
    reference = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=90,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=16,
            rms_norm_eps=1e-5,
            rope_theta=50000.0,
            moe_intermediate_size=24,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=bool(is_normalised),
            tie_word_embeddings=False,
        )
    ).eval()
    randomise(reference)
    ids = torch.randint(0, 89, (LENGTH,), generator=torch.Generator().manual_seed(8))
    expected = theirs(reference, ids, torch.ones(LENGTH, LENGTH, dtype=torch.bool))
    found = ours(tmp_path, shape, unstacked(reference.state_dict()), ids, None)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("is_tied", [False, True])
def test_fast_dllm_v2_is_qwen2_with_a_block_causal_mask(tmp_path: Path, kv_heads: int, is_tied: bool) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = FAST_DLLM_V2 | {"num_key_value_heads": kv_heads, "tie_word_embeddings": is_tied}
    known = {name: value for name, value in shape.items() if name not in ("architectures", "bd_size")}
    reference = Qwen2ForCausalLM(Qwen2Config(**known)).eval()
    randomise(reference)
    ids = torch.randint(0, 89, (LENGTH,), generator=torch.Generator().manual_seed(9))
    blocks = torch.arange(LENGTH) // 8
    expected = theirs(reference, ids, blocks[None, :] <= blocks[:, None])
    weights = {
        name: tensor
        for name, tensor in reference.state_dict().items()
        if not is_tied or "lm_head" not in name
    }
    torch.testing.assert_close(ours(tmp_path, shape, weights, ids, 8), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("is_normalised", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "num_chosen", "step", "dense"), [(6, 2, 1, []), (5, 5, 1, [0]), (8, 1, 2, [])]
)
def test_sdar_moe_is_qwen3_moe_with_a_block_causal_mask(
    tmp_path: Path,
    kv_heads: int,
    is_normalised: bool,
    num_experts: int,
    num_chosen: int,
    step: int,
    dense: list[int],
) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = SDAR_MOE | {
        "num_key_value_heads": kv_heads,
        "num_experts": num_experts,
        "num_experts_per_tok": num_chosen,
        "norm_topk_prob": is_normalised,
        "decoder_sparse_step": step,
        "mlp_only_layers": dense,
    }
    known = {name: value for name, value in shape.items() if name not in ("architectures", "block_size")}
    reference = Qwen3MoeForCausalLM(Qwen3MoeConfig(**known, tie_word_embeddings=False)).eval()
    randomise(reference)
    weights = unstacked(reference.state_dict())
    ids = torch.randint(0, 89, (LENGTH,), generator=torch.Generator().manual_seed(5))
    blocks = torch.arange(LENGTH) // 4
    expected = theirs(reference, ids, blocks[None, :] <= blocks[:, None])
    torch.testing.assert_close(ours(tmp_path, shape, weights, ids, 4), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (4, 4), (8, 2), (2, 1)])
@pytest.mark.parametrize("newer", [False, True])
def test_dream_is_qwen2_that_sees_everything(tmp_path: Path, heads: int, kv_heads: int, newer: bool) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = DREAM | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "rope_theta": 1e6}
    ignored = ("architectures", "use_mrope", "rope_scaling")
    known = {name: value for name, value in shape.items() if name not in ignored}
    reference = Qwen2ForCausalLM(Qwen2Config(**known)).eval()
    randomise(reference)
    ids = torch.randint(0, 89, (LENGTH,), generator=torch.Generator().manual_seed(6))
    expected = theirs(reference, ids, torch.ones(LENGTH, LENGTH, dtype=torch.bool))
    if newer:
        shape |= {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    found = ours(tmp_path, shape, dict(reference.state_dict()), ids, None)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, None])
def test_llada_is_llama_that_sees_everything(tmp_path: Path, kv_heads: int | None) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    reference = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads or 1,
            intermediate_size=96,
            vocab_size=90,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            max_position_embeddings=128,
            tie_word_embeddings=False,
        )
    ).eval()
    randomise(reference)
    names = {
        "model.embed_tokens": "model.transformer.wte",
        "model.norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
        "model.layers.": "model.transformer.blocks.",
        "self_attn.o_proj": "attn_out",
        "self_attn.": "",
        "mlp.gate_proj": "ff_proj",
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
    }
    weights = {}
    for name, tensor in reference.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = tensor
    ids = torch.randint(0, 89, (LENGTH,), generator=torch.Generator().manual_seed(3))
    expected = theirs(reference, ids, torch.ones(LENGTH, LENGTH, dtype=torch.bool))
    config = {
        "architectures": ["LLaDAModelLM"],
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": kv_heads,
        "multi_query_attention": kv_heads is None,
        "mlp_hidden_size": 96,
        "vocab_size": 90,
        "embedding_size": 90,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "max_sequence_length": 128,
        "mask_token_id": 89,
        "eos_token_id": 88,
    }
    torch.testing.assert_close(ours(tmp_path, config, weights, ids, None), expected, atol=1e-4, rtol=1e-4)
