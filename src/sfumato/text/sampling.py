"""Choosing tokens from logits: temperature, top-k, top-p, and noise from a request's random source.

Letters: M positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_and_filter(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return logits [M, V] divided by the temperature, with what top-k and then top-p leave out at -inf.

    Equal logits at the k-th place all stay. top-p keeps the token that crosses the limit.
    """
    logits = logits / temperature if temperature != 1.0 else logits
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before > top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def probability_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the softmax probability f32[M] of one token per position."""
    chosen = logits.gather(-1, tokens[:, None]).squeeze(-1)
    return (chosen - logits.logsumexp(-1)).exp().float()
