"""Random models in real configurations, made on the device: `benchmarks/gpu.py` runs on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.config import EngineConfig
from sfumato.engine.build import Loaded
from sfumato.engine.limits import Limits
from sfumato.models.folder import Folder
from sfumato.models.registry import family_of
from sfumato.models.weights import build_on_meta

CONFIGS = Path(__file__).with_name("configs")
# What makes a configuration small enough for a test on a CPU; the rest stays as it is.
TINY: dict[str, dict[str, Any]] = {
    "llada-8b": {
        "d_model": 64,
        "mlp_hidden_size": 96,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 2,
        "vocab_size": 512,
        "embedding_size": 512,
        "mask_token_id": 511,
        "eos_token_id": 510,
        "block_length": 8,
    },
    "llada2-mini": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rotary_dim": 8,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "vocab_size": 512,
        "mask_token_id": 511,
        "eos_token_id": 510,
        "pad_token_id": 510,
        "block_length": 8,
    },
}
# The width of a random weight's numbers: hidden states stay of a size that bfloat16 holds.
_SPREAD = 0.02


def real_config(name: str, *, is_tiny: bool) -> dict[str, Any]:
    """Return a checkpoint's config.json."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return {**config, **TINY[name]} if is_tiny else config


def random_loaded(
    name: str,
    device: str,
    *,
    is_tiny: bool,
    limits: Limits,
    kv_memory: int,
    quantization: str | None = None,
    **options: Any,
) -> Loaded:
    """Return a random model of a real configuration as an engine takes it."""
    config = real_config(name, is_tiny=is_tiny)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    traits = family_of(config).traits_from_hf(config, {})
    model, targets = build_on_meta(config, quantization=quantization)
    wide = {target.parameter for target in targets.values() if target.is_float32}
    generator = torch.Generator(device).manual_seed(0)
    for path, parameter in list(model.named_parameters()):
        owner, _, leaf = path.rpartition(".")
        made = _random(path, parameter, dtype, device, generator, is_wide=path in wide)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(made, requires_grad=False))
    if model.shape.tied:
        model.output.weight = model.embedding
    model = model.eval()
    model.pack()
    engine = EngineConfig(model=name, device=device, kv_memory=kv_memory, limits=limits, **options)
    folder = Folder(name=name, path=Path("/nonexistent"), config=config, generation={}, traits=traits)
    return Loaded(config=engine, folder=folder, traits=traits, model=model, dtype=dtype, device=device)


def _random(
    path: str,
    like: torch.Tensor,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
    *,
    is_wide: bool,
) -> torch.Tensor:
    if path.endswith("_scale"):
        return torch.full(like.shape, _SPREAD / 100, dtype=torch.float32, device=device)
    kept = torch.float32 if is_wide else dtype if like.dtype.itemsize > 1 else like.dtype
    if like.dim() == 1:
        fill = torch.zeros if path.endswith("bias") else torch.ones
        return fill(like.shape, dtype=kept, device=device)
    if like.dtype.itemsize == 1:
        # Numbers that fill eight bits; their scale makes them as wide as the others.
        made = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
        # Beyond 127 an integer does not hold them, beyond 448 a float is no number.
        return made.normal_(0, 100, generator=generator).clamp_(-127, 127).to(kept)
    return torch.empty(like.shape, dtype=kept, device=device).normal_(0, _SPREAD, generator=generator)


def weight_bytes(model: nn.Module, *, without: str | None = None) -> int:
    """Return the bytes of all weights that a forward reads; of an embedding that is no head, almost nothing.

    without: leave parameters out whose name holds this.
    """
    return sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if name != "embedding" and (without is None or without not in name)
    )
