"""Own a second, plain forward from config.json and published weight names, to check exports against.

Letters: B rows, L positions, D width, H heads, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional

LLADA_LAYER = {
    "norm1": "attn_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "norm2": "ff_norm",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}
SDAR_LAYER = {
    "norm1": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def reference_logits(config: dict, tensors: dict[str, Tensor], token_ids: Tensor) -> Tensor:
    """Return logits f32[B, L, V] for token_ids: i64[B, L], float32 throughout."""
    if config["model_type"] == "llada":
        names, layers, ends = LLADA_LAYER, "model.transformer.blocks", ("wte", "ln_f", "ff_out")
        embed, norm, head = (tensors[f"model.transformer.{end}.weight"] for end in ends)
        num_layers, num_heads, visible = config["n_layers"], config["n_heads"], None
    else:
        names, layers = SDAR_LAYER, "model.layers"
        embed, norm, head = (
            tensors[f"{name}.weight"] for name in ("model.embed_tokens", "model.norm", "lm_head")
        )
        num_layers, num_heads = config["num_hidden_layers"], config["num_attention_heads"]
        block = torch.arange(token_ids.shape[1]) // config["block_size"]
        visible = block[None, :] <= block[:, None]
    x = embed[token_ids]
    for i in range(num_layers):
        layer = {short: tensors[f"{layers}.{i}.{name}.weight"] for short, name in names.items()}
        qk_norms = [tensors.get(f"{layers}.{i}.self_attn.{name}.weight") for name in ("q_norm", "k_norm")]
        x = x + _attention(_rms(x, layer["norm1"], config), layer, qk_norms, num_heads, visible, config)
        m = _rms(x, layer["norm2"], config)
        x = x + (functional.silu(m @ layer["gate"].T) * (m @ layer["up"].T)) @ layer["down"].T
    return _rms(x, norm, config) @ head.T


def _rms(x: Tensor, weight: Tensor, config: dict) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight


def _attention(
    n: Tensor,
    layer: dict[str, Tensor],
    qk_norms: list[Tensor | None],
    num_heads: int,
    visible: Tensor | None,
    config: dict,
) -> Tensor:
    q, k, v = ((n @ layer[name].T).unflatten(-1, (num_heads, -1)).transpose(1, 2) for name in "qkv")
    if qk_norms[0] is not None and qk_norms[1] is not None:
        q, k = _rms(q, qk_norms[0], config), _rms(k, qk_norms[1], config)
    q, k = _rotated(q, config["rope_theta"]), _rotated(k, config["rope_theta"])
    return (
        functional.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)
        @ layer["o"].T
    )


def _rotated(x: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(half) / half)
    turned = torch.view_as_complex(torch.stack((x[..., :half], x[..., half:]), dim=-1)) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat((turned.real, turned.imag), dim=-1)
