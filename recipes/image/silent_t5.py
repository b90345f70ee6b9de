"""Own the stand-in for the third text encoder, a T5 that says nothing, so that the pipeline loads as it is.

Without one, StableDiffusion3Pipeline must be told `text_encoder_3=None, tokenizer_3=None`, and uses zeros.
This encoder's last norm has weight zero: it gives the same zeros.
"""

import torch
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

_SPECIAL = ("<pad>", "</s>", "<unk>")
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
_MAX_LENGTH = 256


def build_silent_encoder(width: int) -> T5EncoderModel:
    """Return the smallest encoder whose output is zeros, f32[B, T, width]."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(_vocabulary()),
        d_model=width,
        d_kv=8,
        d_ff=8,
        num_layers=1,
        num_heads=1,
        use_cache=False,
    )
    encoder = T5EncoderModel(config).eval()
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def build_silent_tokenizer() -> T5TokenizerFast:
    """Return a tokenizer of single letters; what it gives does not matter, only that it gives something."""
    return T5TokenizerFast(vocab=_vocabulary(), extra_ids=0, model_max_length=_MAX_LENGTH)


def _vocabulary() -> list[tuple[str, float]]:
    letters = [_WORD_START, *"abcdefghijklmnopqrstuvwxyz"]
    return [*((token, 0.0) for token in _SPECIAL), *((letter, -1.0) for letter in letters)]
