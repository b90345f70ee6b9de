"""Models that benchmarks run on: the embedded ones, and random ones of about 150 million parameters."""

from __future__ import annotations

from pathlib import Path

import torch

from sfumato.config import EngineConfig
from sfumato.core.traits import BlockOrigin, ModelTraits, Visibility
from sfumato.engine.build import Loaded
from sfumato.engine.limits import Limits
from sfumato.models.decoder import Decoder, DecoderShape
from sfumato.models.folder import Folder
from sfumato.models.int8 import quantized_weight
from sfumato.models.packed import has_bfloat16

# Hidden 768, 12 layers, vocabulary 32000: 148 million parameters.
SHAPE = DecoderShape(
    num_layers=12,
    width=768,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    inner=2560,
    vocab_size=32000,
    rope_theta=10000.0,
    norm_eps=1e-6,
)
MASK_ID = 31999


def fast_dtype() -> torch.dtype:
    """Return bfloat16 where this CPU multiplies it, else float32."""
    return torch.bfloat16 if has_bfloat16() else torch.float32


def random_model(shape: DecoderShape, dtype: torch.dtype, *, pack: bool) -> Decoder:
    """Return a model with seeded random weights; the same seed gives the same weights."""
    generator = torch.Generator().manual_seed(0)
    model = Decoder(shape)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.03)
    model = model.to(dtype).eval()
    if pack:
        model.pack()
    return model


def narrowed(model: Decoder) -> Decoder:
    """Hold a plain model's layers in eight bits and pack them."""
    plain = dict(model.named_parameters())
    model.quantize(torch.int8)
    for name, parameter in model.named_parameters():
        if parameter.dtype is torch.int8:
            weight, scale = quantized_weight(plain[name])
            parameter.copy_(weight)
            model.get_parameter(f"{name}_scale").copy_(scale)
    model.pack()
    return model


def random_loaded(
    family: str, dtype: torch.dtype, block_length: int, limits: Limits, *, is_narrow: bool = False
) -> Loaded:
    """Return a random model of about 150 million parameters as an engine takes it; is_narrow: int8."""
    is_causal = family == "sdar"
    traits = ModelTraits(
        family=family,
        architecture=f"random {family}",
        vocab_size=SHAPE.vocab_size,
        mask_token_id=MASK_ID,
        eos_token_ids=(),
        eot_token_id=None,
        context_length=4096,
        block_length=block_length,
        visibility=Visibility.BLOCK_CAUSAL if is_causal else Visibility.BIDIRECTIONAL,
        block_origin=BlockOrigin.START if is_causal else BlockOrigin.PROMPT_END,
        num_layers=SHAPE.num_layers,
        num_kv_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        default_algorithm=family,
    )
    return loaded_of(traits, SHAPE, dtype, limits, is_narrow=is_narrow)


def loaded_of(
    traits: ModelTraits, shape: DecoderShape, dtype: torch.dtype, limits: Limits, *, is_narrow: bool = False
) -> Loaded:
    """Return a random model of any shape as an engine takes it."""
    config = EngineConfig(model=f"random-{traits.family}", device="cpu", kv_memory=512 << 20, limits=limits)
    folder = Folder(name=config.model, path=Path("/nonexistent"), config={}, generation={}, traits=traits)
    model = random_model(shape, dtype, pack=not is_narrow)
    if is_narrow:
        model = narrowed(model)
    return Loaded(config=config, folder=folder, traits=traits, model=model, dtype=dtype, device="cpu")
